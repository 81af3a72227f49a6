using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>The data section of a v1 migration region in one session: through its mapped areas where there are any, by call elsewhere.</summary>
/// <param name="region">The region.</param>
/// <param name="io">The device; not owned.</param>
/// <param name="info">What the device says about the region.</param>
internal sealed class VfioMigrationRegionData(VfioMigrationRegion region, IVfioDeviceIo io, VfioRegionInfo info) : IDisposable
{
    private readonly List<(VfioRegionArea Area, MappedRegion Map)> _maps = [];

    /// <summary>Maps the areas; one that cannot be mapped is accessed by call.</summary>
    internal void Map()
    {
        foreach (VfioRegionArea area in info.Areas)
            if (io.MapArea(info.Index, area) is { } map) _maps.Add((area, map));
        // The device may list its areas in any order.
        _maps.Sort(static (a, b) => a.Area.OffsetBytes.CompareTo(b.Area.OffsetBytes));
    }

    /// <summary>Gives the mappings back. Idempotent.</summary>
    public void Dispose()
    {
        foreach ((_, MappedRegion map) in _maps) map.Dispose();
        _maps.Clear();
    }

    internal void Read(ulong offset, Span<byte> into)
    {
        while (into.Length > 0)
        {
            int n = Piece(offset, into.Length, out MappedRegion? map, out ulong inMap);
            if (map is not null) map.Slice(inMap, n).CopyTo(into);
            else if (io.RegionRead(info.Index, offset, into[..n]) is var errno and not Errno.None) throw region.Failed($"read data at 0x{offset:x}", errno);
            into = into[n..];
            offset += (ulong)n;
        }
    }

    internal void Write(ulong offset, ReadOnlySpan<byte> from)
    {
        while (from.Length > 0)
        {
            int n = Piece(offset, from.Length, out MappedRegion? map, out ulong inMap);
            if (map is not null) from[..n].CopyTo(map.Slice(inMap, n));
            else if (io.RegionWrite(info.Index, offset, from[..n]) is var errno and not Errno.None) throw region.Failed($"write data at 0x{offset:x}", errno);
            from = from[n..];
            offset += (ulong)n;
        }
    }

    /// <summary>How many bytes can go in one way: up to the end of the mapped area, or up to the next one above.</summary>
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
}
