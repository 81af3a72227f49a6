using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;
using Vmm.Migration.Multifd;

namespace Vmm.Migration.Ram;

/// <summary>Pages over multifd: data pages in packets, zero pages and marks on the main channel (spec 4; zero-page-detection=legacy).</summary>
internal sealed partial class RamMigration
{
    private bool _harvested;

    /// <summary>Source: takes data pages while a migration uses multifd; else null.</summary>
    internal MultifdSender? Sender { get; set; }

    /// <summary>Destination: the marks in the main channel while a load uses multifd; else null.</summary>
    internal SyncMarks? Marks { get; set; }

    /// <summary>The block of that name, or null.</summary>
    internal RamBlock? LoadBlock(string name) => memory.FindBlock(name);

    /// <summary>Notes that a run of pages has been written by this load; any thread.</summary>
    internal void NoteLoaded(RamBlock block, ulong offset, int pages)
    {
        long first = (long)(offset / PageSize);
        if (_knownZero.TryGetValue(block, out DirtyBitmap? written)) written.SetRange(first, pages);
        _received.Of(block)?.SetRange(first, pages);
        Interlocked.Add(ref _loadedPages, pages);
    }

    /// <summary>Makes a page zero unless it is known to be; any thread.</summary>
    internal void LoadZeroPage(RamBlock block, ulong offset)
    {
        Interlocked.Increment(ref _loadedPages);
        long page = (long)(offset / PageSize);
        _received.Of(block)?.Set(page);
        if (_knownZero.TryGetValue(block, out DirtyBitmap? written) && !written.IsSet(page)) return;
        if (!block.IsZeroPage(page)) block.Slice(offset, PageSize).Clear();
    }

    /// <summary>
    /// Between two harvests of dirty marks a page goes at most once, so it is enough that nothing of one harvest overtakes the one before.
    /// (QEMU syncs at the end of each pass for the same end.)
    /// </summary>
    private void SyncChannels(QemuFileWriter f, bool always)
    {
        if (Sender is not { } sender || !sender.Sync(always)) return;
        f.WriteUInt64((ulong)RamSaveFlags.MultifdFlush);
        // The channels wait for this mark.
        f.Flush();
    }
}
