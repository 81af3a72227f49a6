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

    private readonly VfioUserDmaMap _request;
    private readonly ulong _device, _inode;
    private readonly MappedRegion? _map;
    private readonly ulong _skewBytes;
    private readonly OwnedFd? _fd;
    private DirtyBitmap? _log;
    private int _logShift;

    /// <summary>Makes the range; without a descriptor it is reached by messages.</summary>
    /// <param name="request">Checked for wrap-around and flags.</param>
    /// <param name="fd">Owned from here on, on failure too; null for messages.</param>
    /// <param name="file">The descriptor's stat.</param>
    /// <param name="mayMap">False: pread and pwrite even where mmap was asked for.</param>
    /// <exception cref="ChannelException">mmap failed.</exception>
    internal DmaRegion(VfioUserDmaMap request, OwnedFd? fd, in FileStatus file, bool mayMap)
    {
        _request = request with { ArgSz = 0 };
        if (fd is null) return;
        (_device, _inode) = (file.Device, file.Inode);
        if (!mayMap || (request.Flags & VfioUserDmaMap.FlagFileIo) != 0)
        {
            (_fd, Access) = (fd, DmaAccess.File);
            return;
        }
        using (fd)
        {
            // Huge pages must be mapped at a multiple of their size, which the file system reports as its block size.
            ulong align = file.BlockBytes > (long)PageBytes && ulong.IsPow2((ulong)file.BlockBytes) ? (ulong)file.BlockBytes : PageBytes;
            _skewBytes = request.Offset & (align - 1);
            ulong length = (request.Size + _skewBytes + align - 1) & ~(align - 1);
            _map = MappedRegion.Map(fd, length, shared: true, (long)(request.Offset - _skewBytes), $"DMA region 0x{request.Address:x}", IsWritable);
            Access = DmaAccess.Mapped;
        }
    }

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
        request with { ArgSz = 0 } == _request && hasFd == (Access != DmaAccess.Messages) && (!hasFd || (file.Device == _device && file.Inode == _inode));

    internal Errno Read(ulong address, Span<byte> destination)
    {
        ulong at = address - Address;
        if (_map is not null)
        {
            _map.Slice(_skewBytes + at, destination.Length).CopyTo(destination);
            return Errno.None;
        }
        for (ulong offset = _request.Offset + at; destination.Length > 0;)
        {
            int n = Posix.PRead(_fd!, destination, (long)offset, out Errno errno);
            if (n <= 0) return n < 0 ? errno : Errno.EFAULT;
            destination = destination[n..];
            offset += (uint)n;
        }
        return Errno.None;
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
            for (ulong offset = _request.Offset + at; source.Length > 0;)
            {
                int n = Posix.PWrite(_fd!, source, (long)offset, out Errno errno);
                if (n <= 0) return n < 0 ? errno : Errno.EFAULT;
                source = source[n..];
                offset += (uint)n;
            }
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

    public void Dispose()
    {
        _map?.Dispose();
        _fd?.Dispose();
    }

    private ulong LogPages(int shift) => ((End - 1) >> shift) - (Address >> shift) + 1;
}
