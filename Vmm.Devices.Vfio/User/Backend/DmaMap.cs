using System.Numerics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// The client's memory as a hosted device sees it: DMA by address, through descriptors or messages (vfio-user 3.8 to 3.11).
/// Any thread may read and write; maps and unmaps wait until accesses through a descriptor have ended (vfio-user S-21). A transfer that fails may have
/// moved its first bytes.
/// </summary>
public sealed class DmaMap : IDisposable
{
    private const uint KnownFlags = VfioUserDmaMap.FlagRead | VfioUserDmaMap.FlagWrite | VfioUserDmaMap.FlagMmapFd | VfioUserDmaMap.FlagFileIo;

    private readonly ReaderWriterLockSlim _lock = new();
    private readonly int _maxRegions;
    private readonly bool _mayMap, _onlySealed;
    private readonly DmaFiles _files = new();
    // Ascending by address. The session's thread changes it under the write lock and may read it without one.
    private readonly List<DmaRegion> _regions = [];
    private volatile IDmaMessages? _messages;
    private volatile bool _isBusMaster, _isStopped;
    private int _logShift = -1;
    private ulong _logBytes;

    internal DmaMap(int maxRegions, bool mayMap, bool onlySealed = false) => (_maxRegions, _mayMap, _onlySealed) = (maxRegions, mayMap, onlySealed);

    /// <summary>Bit 2 of the command register, which the device must keep up to date. While false every access answers ENODEV.</summary>
    public bool IsBusMaster { get => _isBusMaster; set => _isBusMaster = value; }

    /// <summary>How many ranges the client has mapped.</summary>
    public int RegionCount
    {
        get
        {
            _lock.EnterReadLock();
            int count = _regions.Count;
            _lock.ExitReadLock();
            return count;
        }
    }

    /// <summary>The ranges the client has mapped, in order of their addresses.</summary>
    public IReadOnlyList<GuestRange> Ranges
    {
        get
        {
            _lock.EnterReadLock();
            List<GuestRange> ranges = _regions.ConvertAll(static r => new GuestRange(new GuestAddress(r.Address), r.SizeBytes));
            _lock.ExitReadLock();
            return ranges;
        }
    }

    /// <summary>Descriptors that are kept for ranges reached by pread and pwrite.</summary>
    internal int FileCount => _files.Count;

    internal bool IsLogging => _logShift >= 0;

    internal ulong LogPageBytes => IsLogging ? 1UL << _logShift : 0;

    /// <summary>Sends DMA messages to the client, for ranges without a descriptor; null while there is no client.</summary>
    internal IDmaMessages? Messages { get => _messages; set => _messages = value; }

    /// <summary>Reads guest memory. In ranges without a descriptor it waits for the client, so do not call it from a register access (vfio-user S-30).</summary>
    /// <param name="address">DMA address of the first byte.</param>
    /// <param name="destination">Buffer, filled on success.</param>
    /// <returns>
    /// ENODEV: bus mastering is off. EFAULT: not mapped. EPERM: not readable. EAGAIN: the device is stopped for a migration. ENOTCONN: no
    /// client. Else the client's answer.
    /// </returns>
    public Errno Read(ulong address, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            Errno errno = Enter(address, destination.Length, write: false, out DmaRegion? region, out int count);
            if (errno != Errno.None) return errno;
            try
            {
                errno = region is null ? Errno.None : region.Read(address, destination[..count]);
            }
            finally
            {
                if (region is not null) _lock.ExitReadLock();
            }
            if (region is null) errno = _messages?.Read(address, destination[..count]) ?? Errno.ENOTCONN;
            if (errno != Errno.None) return errno;
            destination = destination[count..];
            address += (uint)count;
        }
        return Errno.None;
    }

    /// <summary>Writes guest memory; as <see cref="Read"/>. Pages written through a descriptor are logged for the client (vfio-user S-25).</summary>
    /// <param name="address">DMA address of the first byte.</param>
    /// <param name="source">Bytes to write.</param>
    /// <returns>As <see cref="Read"/>; EPERM: not writable.</returns>
    public Errno Write(ulong address, ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            Errno errno = Enter(address, source.Length, write: true, out DmaRegion? region, out int count);
            if (errno != Errno.None) return errno;
            try
            {
                errno = region is null ? Errno.None : region.Write(address, source[..count]);
            }
            finally
            {
                if (region is not null) _lock.ExitReadLock();
            }
            if (region is null) errno = _messages?.Write(address, source[..count]) ?? Errno.ENOTCONN;
            if (errno != Errno.None) return errno;
            source = source[count..];
            address += (uint)count;
        }
        return Errno.None;
    }

    /// <summary>Reads guest memory by DMA_READ, also where there is a descriptor: the client sees the access. As <see cref="Read"/> otherwise.</summary>
    /// <param name="address">DMA address of the first byte.</param>
    /// <param name="destination">Buffer, filled on success.</param>
    /// <returns>As <see cref="Read"/>.</returns>
    public Errno ReadByMessages(ulong address, Span<byte> destination)
    {
        Errno errno = Check(address, destination.Length, write: false);
        return errno == Errno.None ? _messages?.Read(address, destination) ?? Errno.ENOTCONN : errno;
    }

    /// <summary>Writes guest memory by DMA_WRITE, also where there is a descriptor; the client tracks these writes itself (vfio-user S-25).</summary>
    /// <param name="address">DMA address of the first byte.</param>
    /// <param name="source">Bytes to write.</param>
    /// <returns>As <see cref="Write"/>.</returns>
    public Errno WriteByMessages(ulong address, ReadOnlySpan<byte> source)
    {
        Errno errno = Check(address, source.Length, write: true);
        return errno == Errno.None ? _messages?.Write(address, source) ?? Errno.ENOTCONN : errno;
    }

    /// <summary>Allows or forbids DMA: a device in a stopped migration state must not write, because no report of dirty pages may follow.</summary>
    internal void SetStopped(bool stopped)
    {
        _lock.EnterWriteLock();
        _isStopped = stopped;
        _lock.ExitWriteLock();
    }

    /// <summary>Adds a range. Takes the descriptor over, also on failure.</summary>
    internal Errno Map(VfioUserDmaMap request, OwnedFd? fd)
    {
        try
        {
            return Map(request, ref fd);
        }
        finally
        {
            fd?.Dispose();
        }
    }

    private Errno Map(VfioUserDmaMap request, ref OwnedFd? fd)
    {
        if ((request.Flags & ~KnownFlags) != 0 || request.Size == 0 || request.Address > ulong.MaxValue - request.Size) return Errno.EINVAL;
        uint how = request.Flags & (VfioUserDmaMap.FlagMmapFd | VfioUserDmaMap.FlagFileIo);
        if (how != 0 && (fd is null || how == (VfioUserDmaMap.FlagMmapFd | VfioUserDmaMap.FlagFileIo))) return Errno.EINVAL;
        if (request.Size > VfioUserLimits.DmaMapBytes) return Errno.ENOSPC;
        FileStatus file = default;
        if (fd is not null)
        {
            Errno errno = Posix.Stat(fd, out file);
            if (errno != Errno.None) return errno;
            // An access behind the end of the file would raise SIGBUS, which ends this process (vfio-user S-18).
            if (file.SizeBytes < 0 || request.Offset > (ulong)file.SizeBytes || request.Size > (ulong)file.SizeBytes - request.Offset) return Errno.EINVAL;
        }
        int at = FirstEndingAfter(request.Address);
        if (at < _regions.Count && _regions[at].Address < request.Address + request.Size) return _regions[at].Is(request, fd is not null, file) ? Errno.None : Errno.EINVAL;
        if (_regions.Count >= _maxRegions) return Errno.EINVAL;
        return Add(at, request, ref fd, file);
    }

    /// <summary>Removes one range, which must be exactly one that was mapped (vfio-user S-21). With a bitmap, reports its dirty pages a last time.</summary>
    internal Errno Unmap(ulong address, ulong sizeBytes, ulong pageSizeBytes, Span<byte> bitmap)
    {
        int at = FirstEndingAfter(address);
        if (at >= _regions.Count || _regions[at].Address != address || _regions[at].SizeBytes != sizeBytes) return Errno.ENOENT;
        DmaRegion gone = _regions[at];
        _lock.EnterWriteLock();
        _regions.RemoveAt(at);
        _lock.ExitWriteLock();
        if (!bitmap.IsEmpty) gone.Report(address, sizeBytes, pageSizeBytes, bitmap);
        if (IsLogging) _logBytes -= gone.LogBytes(_logShift);
        Drop(gone);
        return Errno.None;
    }

    /// <summary>Removes all ranges.</summary>
    internal void Clear()
    {
        DmaRegion[] gone = [.. _regions];
        _lock.EnterWriteLock();
        _regions.Clear();
        _lock.ExitWriteLock();
        _logBytes = 0;
        foreach (DmaRegion region in gone) Drop(region);
    }

    /// <summary>Starts the log of writes through descriptors (vfio-user S-25); a second start with the same page size changes nothing.</summary>
    internal Errno StartLog(ulong pageSizeBytes)
    {
        if (pageSizeBytes < 4096 || pageSizeBytes > VfioUserLimits.DirtyPageBytes || !BitOperations.IsPow2(pageSizeBytes)) return Errno.EINVAL;
        int shift = BitOperations.TrailingZeroCount(pageSizeBytes);
        if (IsLogging) return shift == _logShift ? Errno.None : Errno.EINVAL;
        ulong bytes = _regions.Aggregate(0UL, (sum, r) => sum + r.LogBytes(shift));
        if (bytes > VfioUserLimits.DirtyLogBytes) return Errno.ENOMEM;
        _logBytes = bytes;
        _lock.EnterWriteLock();
        foreach (DmaRegion region in _regions) region.StartLog(shift);
        _logShift = shift;
        _lock.ExitWriteLock();
        return Errno.None;
    }

    internal void StopLog()
    {
        _lock.EnterWriteLock();
        foreach (DmaRegion region in _regions) region.StopLog();
        _logShift = -1;
        _lock.ExitWriteLock();
    }

    /// <summary>
    /// Reads and clears the log of any range: parts of maps, several maps, holes. Holes, and ranges whose writes the client sees itself, report 0
    /// (vfio-user S-24).
    /// </summary>
    /// <returns>EINVAL: the log is off, or the page size or the range is invalid.</returns>
    internal Errno Report(ulong iova, ulong lengthBytes, ulong pageSizeBytes, Span<byte> bitmap)
    {
        if (!IsLogging || !BitOperations.IsPow2(pageSizeBytes) || lengthBytes == 0 || iova > ulong.MaxValue - lengthBytes) return Errno.EINVAL;
        bitmap.Clear();
        for (int i = FirstEndingAfter(iova); i < _regions.Count && _regions[i].Address < iova + lengthBytes; i++) _regions[i].Report(iova, lengthBytes, pageSizeBytes, bitmap);
        return Errno.None;
    }

    /// <summary>Removes all ranges. No access may be under way.</summary>
    public void Dispose()
    {
        Clear();
        _lock.Dispose();
    }

    private int FirstEndingAfter(ulong address)
    {
        int low = 0, high = _regions.Count;
        while (low < high)
        {
            int middle = (low + high) / 2;
            if (_regions[middle].End <= address) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    private Errno Add(int at, VfioUserDmaMap request, ref OwnedFd? fd, in FileStatus file)
    {
        DmaRegion? region;
        try
        {
            region = Make(request, ref fd, file);
        }
        catch (ChannelException e)
        {
            return e.Errno;
        }
        if (region is null) return Errno.EMFILE;
        if (IsLogging)
        {
            ulong bytes = region.LogBytes(_logShift);
            if (_logBytes + bytes > VfioUserLimits.DirtyLogBytes)
            {
                Drop(region);
                return Errno.ENOMEM;
            }
            _logBytes += bytes;
            region.StartLog(_logShift);
        }
        _lock.EnterWriteLock();
        _regions.Insert(at, region);
        _lock.ExitWriteLock();
        return Errno.None;
    }

    /// <summary>Makes a range. Where mmap is not allowed, or this process has no mapping to spare, it is reached by pread and pwrite.</summary>
    /// <returns>Null when the client has too many files.</returns>
    private DmaRegion? Make(VfioUserDmaMap request, ref OwnedFd? fd, in FileStatus file)
    {
        if (fd is null) return new DmaRegion(request);
        bool map = (request.Flags & VfioUserDmaMap.FlagFileIo) == 0 && _mayMap && (!_onlySealed || Posix.IsSealedAgainstShrinking(fd));
        if (map && DmaRegion.TryReserveMapping()) return new DmaRegion(request, file, fd);
        return _files.Take(ref fd, file, (request.Flags & VfioUserDmaMap.FlagWrite) != 0) is { } shared ? new DmaRegion(request, file, shared) : null;
    }

    private void Drop(DmaRegion region)
    {
        region.Dispose();
        if (region.File is { } file) _files.Release(file);
    }

    /// <summary>Checks that all of an access is mapped and allowed.</summary>
    private Errno Check(ulong address, int length, bool write)
    {
        while (length > 0)
        {
            Errno errno = Enter(address, length, write, out DmaRegion? region, out int count);
            if (region is not null) _lock.ExitReadLock();
            if (errno != Errno.None) return errno;
            length -= count;
            address += (uint)count;
        }
        return Errno.None;
    }

    /// <summary>Finds the range of an access. With a region, returns with the read lock held; without one, the access goes by messages.</summary>
    private Errno Enter(ulong address, int length, bool write, out DmaRegion? region, out int count)
    {
        region = null;
        count = 0;
        if (!_isBusMaster) return Errno.ENODEV;
        _lock.EnterReadLock();
        List<DmaRegion> regions = _regions;
        int at = FirstEndingAfter(address);
        Errno errno = _isStopped ? Errno.EAGAIN
            : at >= regions.Count || regions[at].Address > address ? Errno.EFAULT
            : !(write ? regions[at].IsWritable : regions[at].IsReadable) ? Errno.EPERM
            : Errno.None;
        if (errno == Errno.None)
        {
            count = (int)Math.Min((ulong)length, regions[at].End - address);
            if (regions[at].Access != DmaAccess.Messages)
            {
                region = regions[at];
                return Errno.None;
            }
        }
        _lock.ExitReadLock();
        return errno;
    }
}
