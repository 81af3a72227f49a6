using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>How the server reaches one range of the client's memory.</summary>
internal enum DmaAccess
{
    /// <summary>By DMA_READ and DMA_WRITE messages, because it came without a descriptor (vfio-user S-19).</summary>
    Messages,
    /// <summary>By mmap of the descriptor.</summary>
    Mapped,
    /// <summary>By pread and pwrite on the descriptor.</summary>
    File,
}

/// <summary>
/// One range of the client's memory (vfio-user S-20). Writes through it are logged here while the log is on (vfio-user S-25). Guarded by
/// <see cref="DmaMap"/>'s lock.
/// </summary>
internal sealed class DmaRegion : IDisposable
{
    private const ulong PageBytes = VfioUserLimits.PageBytes;

    private static int s_mapped; // Ranges of all devices of this process that are reached by mmap.

    private readonly VfioUserDmaMap _request;
    private readonly FileStatus _status;
    private readonly MappedRegion? _map;
    private readonly ulong _skewBytes;
    private DirtyBitmap? _log;
    private int _logShift;

    /// <summary>Makes a range that is reached by messages. Each constructor takes a request that was checked for wrap-around and flags.</summary>
    internal DmaRegion(VfioUserDmaMap request) => _request = request with { ArgSz = 0 };

    /// <summary>Makes a range that is reached by pread and pwrite.</summary>
    /// <param name="request">What to map.</param>
    /// <param name="status">The file's fstat.</param>
    /// <param name="file">The file, which whoever disposes the range releases.</param>
    internal DmaRegion(VfioUserDmaMap request, in FileStatus status, DmaFile file) : this(request) => (_status, File, Access) = (status, file, DmaAccess.File);

    /// <summary>Maps a range, after <see cref="TryReserveMapping"/>; gives the reservation back when that fails.</summary>
    /// <param name="request">What to map.</param>
    /// <param name="status">The descriptor's fstat.</param>
    /// <param name="fd">Stays the caller's.</param>
    /// <exception cref="ChannelException">mmap failed.</exception>
    internal DmaRegion(VfioUserDmaMap request, in FileStatus status, OwnedFd fd) : this(request)
    {
        _status = status;
        // Huge pages must be mapped at a multiple of their size, which the file system reports as its block size.
        ulong align = status.BlockBytes > (long)PageBytes && ulong.IsPow2((ulong)status.BlockBytes) ? (ulong)status.BlockBytes : PageBytes;
        _skewBytes = request.Offset & (align - 1);
        ulong length = (request.Size + _skewBytes + align - 1) & ~(align - 1);
        try
        {
            _map = MappedRegion.Map(fd, length, shared: true, (long)(request.Offset - _skewBytes), $"DMA region 0x{request.Address:x}", IsWritable);
        }
        catch (ChannelException)
        {
            Interlocked.Decrement(ref s_mapped);
            throw;
        }
        Access = DmaAccess.Mapped;
    }

    /// <summary>Ranges of this process that are reached by mmap.</summary>
    internal static int MappedCount => Volatile.Read(ref s_mapped);

    /// <summary>Reserves one of this process's mappings. False when clients have as many as they may have.</summary>
    internal static bool TryReserveMapping()
    {
        if (Interlocked.Increment(ref s_mapped) <= VfioUserLimits.MappedRegions) return true;
        Interlocked.Decrement(ref s_mapped);
        return false;
    }

    /// <summary>The file of a range with <see cref="DmaAccess.File"/>.</summary>
    internal DmaFile? File { get; }

    internal DmaAccess Access { get; } = DmaAccess.Messages;

    internal ulong Address => _request.Address;

    internal ulong SizeBytes => _request.Size;

    internal ulong End => _request.Address + _request.Size;

    internal bool IsReadable => (_request.Flags & VfioUserDmaMap.FlagRead) != 0;

    internal bool IsWritable => (_request.Flags & VfioUserDmaMap.FlagWrite) != 0;

    /// <summary>Bytes of dirty log for a page size; 0 for ranges whose writes the client tracks itself.</summary>
    internal ulong LogBytes(int pageShift) => Access == DmaAccess.Messages ? 0 : ((LogPages(pageShift) + 63) / 64) * 8;

    /// <summary>Whether a request repeats this map, which is no error.</summary>
    internal bool Is(VfioUserDmaMap request, bool hasFd, in FileStatus file) =>
        request with { ArgSz = 0 } == _request && hasFd == (Access != DmaAccess.Messages) && (!hasFd || (file.Device == _status.Device && file.Inode == _status.Inode));

    internal Errno Read(ulong address, Span<byte> destination)
    {
        ulong at = address - Address;
        if (_map is not null)
        {
            _map.Slice(_skewBytes + at, destination.Length).CopyTo(destination);
            return Errno.None;
        }
        return File!.Read(_request.Offset + at, destination);
    }

    internal Errno Write(ulong address, ReadOnlySpan<byte> source)
    {
        ulong at = address - Address;
        int length = source.Length;
        if (_map is not null)
        {
            source.CopyTo(_map.Slice(_skewBytes + at, length));
        }
        else
        {
            Errno errno = File!.Write(_request.Offset + at, source);
            if (errno != Errno.None) return errno;
        }
        // Marked after the write: a report between the two leaves the page to the next report.
        if (_log is { } log && length > 0)
        {
            ulong first = (address >> _logShift) - (Address >> _logShift);
            ulong last = ((address + (uint)length - 1) >> _logShift) - (Address >> _logShift);
            log.SetRange((long)first, (long)(last - first + 1));
        }
        return Errno.None;
    }

    /// <summary>Starts the log with no page marked.</summary>
    internal void StartLog(int pageShift)
    {
        if (Access == DmaAccess.Messages) return;
        _logShift = pageShift;
        _log = new DirtyBitmap((long)LogPages(pageShift));
    }

    internal void StopLog() => _log = null;

    /// <summary>
    /// Sets the bits of pages written since the last report. A logged page that the range covers only in part stays dirty, because its other part
    /// has not been reported.
    /// </summary>
    internal void Report(ulong iova, ulong lengthBytes, ulong pageSizeBytes, Span<byte> bitmap)
    {
        if (_log is not { } log) return;
        ulong start = Math.Max(iova, Address), end = Math.Min(iova + lengthBytes, End);
        if (start >= end) return;
        ulong basePage = Address >> _logShift;
        long last = (long)(((end - 1) >> _logShift) - basePage);
        for (long page = log.FindNext((long)((start >> _logShift) - basePage)); page <= last; page = log.FindNext(page + 1))
        {
            ulong pageStart = Math.Max(((ulong)page + basePage) << _logShift, Address);
            ulong pageEnd = Math.Min(((ulong)page + basePage + 1) << _logShift, End);
            if (pageStart >= start && pageEnd <= end) log.TestAndClear(page);
            ulong lastBit = (Math.Min(pageEnd, end) - 1 - iova) / pageSizeBytes;
            for (ulong bit = (Math.Max(pageStart, start) - iova) / pageSizeBytes; bit <= lastBit; bit++) bitmap[(int)(bit >> 3)] |= (byte)(1 << (int)(bit & 7));
        }
    }

    /// <summary>Unmaps the range. Once.</summary>
    public void Dispose()
    {
        if (_map is null) return;
        _map.Dispose();
        Interlocked.Decrement(ref s_mapped);
    }

    private ulong LogPages(int shift) => ((End - 1) >> shift) - (Address >> shift) + 1;
}
