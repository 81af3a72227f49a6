using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Ram;

/// <summary>One RAM block of one attempt to load. Records of the stream come on one thread, pages from data channels on any.</summary>
/// <param name="block">The block.</param>
/// <param name="received">Pages that have come.</param>
/// <param name="isZero">True when nobody has written to the block yet.</param>
internal sealed class RamBlockLoad(RamBlock block, DirtyBitmap received, bool isZero) : ILoadBlock
{
    // A block is only looked through when its first page comes: in an update none comes, and the guest is stopped meanwhile.
    private readonly Lazy<DirtyBitmap> _mayHaveMemory = new(() => FindMemory(block, isZero));

    public RamBlock Block => block;

    /// <summary>Pages that may not be zero.</summary>
    internal DirtyBitmap MayHaveMemory => _mayHaveMemory.Value;

    public void NoteLoaded(ulong offset, int pages)
    {
        long first = (long)(offset / RamBlock.PageSize);
        _mayHaveMemory.Value.SetRange(first, pages);
        received.SetRange(first, pages);
    }

    public void LoadZeroPage(ulong offset)
    {
        NoteReceived(offset);
        Clear(offset);
    }

    internal void NoteReceived(ulong offset) => received.Set((long)(offset / RamBlock.PageSize));

    internal void NoteWritten(ulong offset) => _mayHaveMemory.Value.Set((long)(offset / RamBlock.PageSize));

    internal void Clear(ulong offset)
    {
        long page = (long)(offset / RamBlock.PageSize);
        if (_mayHaveMemory.Value.IsSet(page) && !block.IsZeroPage(page)) block.Slice(offset, RamBlock.PageSize).Clear();
    }

    /// <summary>
    /// Pages that may have memory; all others read as zero, and a zero page is skipped there, so that it gets no memory. An attempt before this one may have
    /// written some pages, so the block is asked unless nobody has written to it.
    /// </summary>
    private static DirtyBitmap FindMemory(RamBlock block, bool isZero)
    {
        var pages = new DirtyBitmap(block.PageCount);
        if (isZero) return pages;
        var holes = new DirtyBitmap(block.PageCount);
        block.FindHoles(holes);
        for (int word = 0; word < pages.WordCount; word++) pages.OrWord(word, ~holes.TakeWord(word));
        return pages;
    }
}
