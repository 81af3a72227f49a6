using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The v1 migration region: <c>u32 device_state@0, u32 reserved@4, u64 pending_bytes@8, u64 data_offset@16, u64 data_size@24</c>, then the data
/// section wherever data_offset says (vfio-migration 5.1). The header is always accessed by call, at native width; the data section through
/// its mapped areas where there are any. What the device says about places and sizes is checked before it is used.
/// </summary>
/// <param name="io">The device; not owned.</param>
/// <param name="info">The region.</param>
internal sealed class VfioMigrationRegion(IVfioDeviceIo io, VfioRegionInfo info) : IDisposable
{
    /// <summary>RUNNING, SAVING and RESUMING.</summary>
    internal const uint StateMask = 7, Running = 1, Saving = 2, Resuming = 4;

    private const ulong DeviceState = 0, PendingBytes = 8, DataOffset = 16, DataSize = 24;

    private List<(VfioRegionArea Area, MappedRegion Map)> _maps = [];

    /// <summary>Size of the region.</summary>
    internal ulong SizeBytes => info.SizeBytes;

    /// <summary>Whether one may write a state: RESUMING alone, or not at all (vfio-migration 5.2; QEMU: <c>VFIO_DEVICE_STATE_VALID</c>).</summary>
    /// <param name="state">All 32 bits.</param>
    /// <returns>The verdict.</returns>
    internal static bool IsValid(uint state) => (state & Resuming) == 0 || (state & StateMask) == Resuming;

    /// <summary>Whether the device says that it is broken (QEMU: <c>VFIO_DEVICE_STATE_IS_ERROR</c>).</summary>
    /// <param name="state">All 32 bits.</param>
    /// <returns>SAVING and RESUMING without RUNNING.</returns>
    internal static bool IsError(uint state) => (state & StateMask) == (Saving | Resuming);

    /// <summary>Maps the areas for the length of a session; a refusal leaves the slow path.</summary>
    internal void Map()
    {
        foreach (VfioRegionArea area in info.Areas)
            if (io.MapArea(info.Index, area) is { } map) _maps.Add((area, map));
        // The device may list its areas in any order.
        _maps.Sort(static (a, b) => a.Area.OffsetBytes.CompareTo(b.Area.OffsetBytes));
    }

    /// <summary>Gives the mappings back. Idempotent.</summary>
    internal void Unmap()
    {
        List<(VfioRegionArea Area, MappedRegion Map)> maps = _maps;
        _maps = [];
        foreach ((_, MappedRegion map) in maps) map.Dispose();
    }

    public void Dispose() => Unmap();

    internal Errno ReadState(out uint state)
    {
        Span<byte> bytes = stackalloc byte[4];
        Errno errno = io.RegionRead(info.Index, DeviceState, bytes);
        state = errno == Errno.None ? BinaryPrimitives.ReadUInt32LittleEndian(bytes) : 0;
        return errno;
    }

    internal Errno WriteState(uint state)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, state);
        return io.RegionWrite(info.Index, DeviceState, bytes);
    }

    internal Errno ReadPendingBytes(out ulong bytes) => ReadHeader(PendingBytes, out bytes);

    /// <summary>Where the next data are or go; reading it makes a saving device put them there.</summary>
    internal ulong ReadDataOffset()
    {
        Errno errno = ReadHeader(DataOffset, out ulong offset);
        if (errno != Errno.None) throw Failed("read data_offset", errno);
        if (offset < 32 || offset > info.SizeBytes)
            throw new VfioException($"device '{io.Name}': data_offset 0x{offset:x} is not inside the data section, 0x20 to 0x{info.SizeBytes:x}", Errno.EINVAL);
        return offset;
    }

    /// <summary>How many bytes lie at the data offset.</summary>
    internal ulong ReadDataSize(ulong offset)
    {
        Errno errno = ReadHeader(DataSize, out ulong size);
        if (errno != Errno.None) throw Failed("read data_size", errno);
        if (size > info.SizeBytes - offset)
            throw new VfioException($"device '{io.Name}': data_size 0x{size:x} at 0x{offset:x} goes beyond the region of 0x{info.SizeBytes:x} bytes", Errno.EINVAL);
        return size;
    }

    /// <summary>Tells a resuming device that so many bytes are in place.</summary>
    internal void CommitDataSize(ulong size)
    {
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, size);
        Errno errno = io.RegionWrite(info.Index, DataSize, bytes);
        if (errno != Errno.None) throw Failed("write data_size", errno);
    }

    internal void ReadData(ulong offset, Span<byte> into)
    {
        while (into.Length > 0)
        {
            int n = Piece(offset, into.Length, out MappedRegion? map, out ulong inMap);
            if (map is not null) map.Slice(inMap, n).CopyTo(into);
            else if (io.RegionRead(info.Index, offset, into[..n]) is var errno and not Errno.None) throw Failed($"read data at 0x{offset:x}", errno);
            into = into[n..];
            offset += (ulong)n;
        }
    }

    internal void WriteData(ulong offset, ReadOnlySpan<byte> from)
    {
        while (from.Length > 0)
        {
            int n = Piece(offset, from.Length, out MappedRegion? map, out ulong inMap);
            if (map is not null) from[..n].CopyTo(map.Slice(inMap, n));
            else if (io.RegionWrite(info.Index, offset, from[..n]) is var errno and not Errno.None) throw Failed($"write data at 0x{offset:x}", errno);
            from = from[n..];
            offset += (ulong)n;
        }
    }

    /// <summary>How far the present way of access reaches: to the end of the mapped area, or to the next one above.</summary>
    private int Piece(ulong offset, int length, out MappedRegion? map, out ulong inMap)
    {
        (map, inMap) = (null, 0);
        ulong end = offset + (ulong)length;
        foreach ((VfioRegionArea area, MappedRegion m) in _maps)
        {
            if (area.End <= offset) continue;
            if (area.OffsetBytes > offset) return (int)(Math.Min(end, area.OffsetBytes) - offset);
            (map, inMap) = (m, offset - area.OffsetBytes);
            return (int)(Math.Min(end, area.End) - offset);
        }
        return length;
    }

    private Errno ReadHeader(ulong field, out ulong value)
    {
        Span<byte> bytes = stackalloc byte[8];
        Errno errno = io.RegionRead(info.Index, field, bytes);
        value = errno == Errno.None ? BinaryPrimitives.ReadUInt64LittleEndian(bytes) : 0;
        return errno;
    }

    private VfioException Failed(string what, Errno errno) => new($"device '{io.Name}': migration region: {what} failed ({errno})", errno);
}
