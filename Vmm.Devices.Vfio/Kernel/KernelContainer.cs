using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// What type1 containers and iommufd address spaces share: the list of mapped pieces of RAM, mapping around addresses that the IOMMU reserves,
/// and dirty queries split as the kernel needs it. BQL: held for every call.
/// </summary>
internal abstract class KernelContainer(string name, ILogger logger) : IVfioContainer, IDisposable
{
    /// <summary>Granularity of every map and query.</summary>
    protected const ulong PageBytes = RamBlock.PageSize;

    private readonly SortedList<ulong, Mapping> _mappings = [];

    /// <summary>One piece of RAM that devices can reach.</summary>
    /// <param name="Range">DMA addresses of the piece.</param>
    /// <param name="Block">RAM block that has the piece.</param>
    /// <param name="OffsetBytes">Offset of the piece in the block.</param>
    protected sealed record Mapping(GuestRange Range, RamBlock Block, ulong OffsetBytes);

    /// <summary>Another process made the mappings and they stay as they are: this object only notes RAM, and unmaps nothing (vfio-migration 7.6).</summary>
    protected bool LeavesMappingsAlone { get; set; }

    /// <summary>The mapped pieces with their addresses in this process.</summary>
    protected IEnumerable<Mapping> Placed => _mappings.Values;

    public string Name => name;

    public abstract bool CanLogDirty { get; }

    public abstract ulong MaxDirtyBitmapBytes { get; }

    /// <summary>The mapped pieces, by DMA address.</summary>
    internal IReadOnlyList<GuestRange> Mappings => [.. _mappings.Values.Select(static m => m.Range)];

    /// <summary>Logger.</summary>
    protected ILogger Logger => logger;

    /// <summary>Address ranges that devices can use, as first and last byte; empty when the kernel names no limit.</summary>
    protected IReadOnlyList<(ulong First, ulong Last)> UsableRanges { get; set; } = [];

    /// <summary>Longest range of one mapping.</summary>
    protected virtual ulong MaxMappingBytes => ulong.MaxValue & ~(PageBytes - 1);

    /// <summary>Longest range of one query; 0 when a query must cover whole mappings.</summary>
    protected abstract ulong MaxQueryBytes { get; }

    public void SectionAdded(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        var done = new List<GuestRange>();
        try
        {
            foreach (GuestRange piece in Pieces(section.Range))
            {
                ulong offset = section.OffsetBytes + (piece.Start.Value - section.Range.Start.Value);
                Errno errno = LeavesMappingsAlone ? Errno.None : Map(piece, section.Block, offset, !section.IsReadOnly);
                if (errno != Errno.None) throw new VfioException($"{Name}: cannot map {piece} of RAM block '{section.Block.Name}' for DMA: {Posix.Describe(errno)}", errno) { Hint = MapHint(errno) };
                done.Add(piece);
                _mappings.Add(piece.Start.Value, new Mapping(piece, section.Block, offset));
            }
        }
        catch
        {
            foreach (GuestRange piece in done)
            {
                _mappings.Remove(piece.Start.Value);
                Errno errno = LeavesMappingsAlone ? Errno.None : Unmap(piece);
                if (errno != Errno.None) VfioKernelLog.CleanupFailed(logger, Name, $"unmap of {piece}", errno);
            }
            throw;
        }
    }

    public void SectionRemoved(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        foreach (GuestRange piece in Overlapping(section.Range))
        {
            Errno errno = LeavesMappingsAlone ? Errno.None : Unmap(piece);
            if (errno != Errno.None) throw new VfioException($"{Name}: cannot unmap {piece} of RAM block '{section.Block.Name}', which devices may still write: {Posix.Describe(errno)}", errno);
            _mappings.Remove(piece.Start.Value);
        }
    }

    public abstract Errno StartDirtyLog();

    public abstract Errno StopDirtyLog();

    public Errno GetDirtyBitmap(GuestRange range, Span<ulong> bitmap)
    {
        if ((range.Start.Value | range.LengthBytes) % PageBytes != 0 || (ulong)bitmap.Length * 64 < range.LengthBytes / PageBytes) return Errno.EINVAL;
        foreach (GuestRange mapping in Overlapping(range))
        {
            ulong from = Math.Max(mapping.Start.Value, range.Start.Value), to = Math.Min(mapping.End, range.End);
            if (MaxQueryBytes == 0 && to - from != mapping.LengthBytes) return Errno.EINVAL;
            while (from < to)
            {
                ulong length = MaxQueryBytes == 0 ? to - from : Math.Min(MaxQueryBytes, to - from);
                ulong[] words = new ulong[((length / PageBytes) + 63) / 64];
                Errno errno = Query(new GuestRange(new GuestAddress(from), length), words);
                if (errno != Errno.None) return errno;
                OrInto(bitmap, (from - range.Start.Value) / PageBytes, words, length / PageBytes);
                from += length;
            }
        }
        return Errno.None;
    }

    public abstract void Dispose();

    /// <summary>Maps a piece of a block.</summary>
    protected abstract Errno Map(GuestRange piece, RamBlock block, ulong offsetBytes, bool isWritable);

    /// <summary>Unmaps what <see cref="Map"/> mapped; succeeds also when it is not mapped.</summary>
    protected abstract Errno Unmap(GuestRange piece);

    /// <summary>Reads and clears the log of one mapping, or of a part of it; sets bits in a clear bitmap.</summary>
    protected abstract Errno Query(GuestRange range, Span<ulong> words);

    /// <summary>Hint for the user when a mapping fails.</summary>
    protected virtual string? MapHint(Errno errno) => errno switch
    {
        Errno.ENOMEM => "all guest RAM is locked: raise the limit of locked memory (ulimit -l), or run with CAP_IPC_LOCK",
        Errno.ENOSPC => "the container has no DMA mapping left (vfio_iommu_type1.dma_entry_limit)",
        Errno.EFAULT => "the memory behind the RAM block cannot be pinned; its file system may not allow that",
        _ => null,
    };

    /// <summary>Sets bits of one bitmap in another, from a given page of it on.</summary>
    internal static void OrInto(Span<ulong> target, ulong firstPage, ReadOnlySpan<ulong> source, ulong pages)
    {
        int word = (int)(firstPage / 64), shift = (int)(firstPage % 64);
        for (int i = 0; i < source.Length; i++)
        {
            ulong marks = source[i], left = pages - ((ulong)i * 64);
            if (left < 64) marks &= (1UL << (int)left) - 1;
            if (marks == 0) continue;
            target[word + i] |= marks << shift;
            if (shift > 0 && marks >> (64 - shift) is var high && high != 0) target[word + i + 1] |= high;
        }
    }

    /// <summary>The parts of a range that devices can address; none is longer than one mapping may be.</summary>
    private List<GuestRange> Pieces(GuestRange range)
    {
        var pieces = new List<GuestRange>();
        ulong at = range.Start.Value;
        IEnumerable<(ulong First, ulong Last)> usable = UsableRanges.Count == 0 ? [(0, ulong.MaxValue)] : UsableRanges.OrderBy(static r => r.First);
        foreach ((ulong first, ulong last) in usable)
        {
            // Compares last bytes, because a range may end at 2^64.
            ulong from = Math.Max((first + PageBytes - 1) & ~(PageBytes - 1), at), end = Math.Min(last == ulong.MaxValue ? last : (last + 1) & ~(PageBytes - 1), range.End);
            if (from >= end || from < first) continue;
            if (from > at) VfioKernelLog.ReservedRange(logger, Name, at, from - at);
            for (; from < end; from += pieces[^1].LengthBytes) pieces.Add(new GuestRange(new GuestAddress(from), Math.Min(MaxMappingBytes, end - from)));
            at = end;
        }
        if (at < range.End) VfioKernelLog.ReservedRange(logger, Name, at, range.End - at);
        return pieces;
    }

    private List<GuestRange> Overlapping(GuestRange range) =>
        [.. _mappings.Values.Select(static m => m.Range).Where(m => m.Start.Value < range.End && range.Start.Value < m.End)];
}
