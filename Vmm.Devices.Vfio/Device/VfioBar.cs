using System.Buffers.Binary;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// A BAR or the ROM of a device: accesses inside a mapped area go straight to it, others by call. The region may be smaller than
/// the BAR; reads beyond it give all ones. Thread-safe; disposal may race with accesses (QEMU: <c>VFIOBAR</c>, <c>VFIORegion</c>).
/// </summary>
internal sealed class VfioBar(VfioDeviceAccess access, VfioRegionInfo info, PciBarType type) : IDisposable
{
    private const ulong PageBytes = 4096;

    // Replaced as a whole, because accesses read it without a lock.
    private volatile (VfioRegionArea Area, MappedRegion Mapping)[] _mapped = [];

    internal PciBarType Type => type;

    internal VfioRegionInfo Info => info;

    internal bool HasMappings => _mapped.Length > 0;

    private bool IsIo => (type & PciBarType.Io) != 0;

    /// <summary>Size of the BAR: the region's, rounded up to a power of two and to the least a BAR of its kind can have.</summary>
    internal ulong SizeBytes => Math.Max(System.Numerics.BitOperations.RoundUpToPowerOf2(info.SizeBytes), IsIo ? 4UL : 16UL);

    public void Dispose() => Unmap();

    /// <summary>Ends direct access; every access goes by call from now on. The guest must have no way to the areas any more.</summary>
    internal void Unmap()
    {
        (VfioRegionArea Area, MappedRegion Mapping)[] gone = _mapped;
        _mapped = [];
        foreach ((_, MappedRegion mapping) in gone) mapping.Dispose();
    }

    /// <summary>Maps the areas, leaving out pages that hold MSI-X structures where the device does not allow those to be mapped.</summary>
    internal void MapAreas(int bar, MsixLayout? msix)
    {
        List<VfioRegionArea> areas = [.. info.Areas];
        if (msix is { } m && !info.IsMsixMappable)
        {
            if (m.TableBar == bar) Exclude(areas, m.TableOffset, (ulong)m.TableBytes);
            if (m.PbaBar == bar) Exclude(areas, m.PbaOffset, (ulong)m.PbaBytes);
        }
        var mapped = new List<(VfioRegionArea Area, MappedRegion Mapping)>();
        foreach (VfioRegionArea area in areas)
        {
            if (access.Io.MapArea(info.Index, area) is { } mapping) mapped.Add((area, mapping));
            else VfioLog.AreaNotMapped(access.Logger, access.Id, bar, area.OffsetBytes);
        }
        _mapped = [.. mapped];
    }

    internal ulong Read(ulong offset, int size, bool direct = true)
    {
        if (access.IsLost || (info.Flags & VfioRegionFlags.Read) == 0 || offset + (ulong)size > info.SizeBytes) return PciHost.AllOnes(size);
        if (direct && Find(offset, size) is { } hit && hit.Mapping.TryReadIo(offset - hit.Area.OffsetBytes, size, out ulong value)) return value;
        Span<byte> bytes = stackalloc byte[8];
        bytes.Clear();
        return access.Read(info.Index, offset, bytes[..size]) ? BinaryPrimitives.ReadUInt64LittleEndian(bytes) : PciHost.AllOnes(size);
    }

    internal void Write(ulong offset, int size, ulong value, bool posted)
    {
        if (access.IsLost || (info.Flags & VfioRegionFlags.Write) == 0 || offset + (ulong)size > info.SizeBytes) return;
        if (Find(offset, size) is { } hit && hit.Mapping.TryWriteIo(offset - hit.Area.OffsetBytes, size, value)) return;
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        access.Write(info.Index, offset, bytes[..size], posted && !IsIo);
    }

    /// <summary>The parts of the mapped areas that the guest may access directly: whole pages without MSI-X structures, which are always emulated.</summary>
    internal IEnumerable<(GuestRange Range, MappedRegion Mapping, ulong Offset)> DirectAreas(int bar, ulong address, MsixLayout? msix)
    {
        foreach ((VfioRegionArea whole, MappedRegion mapping) in _mapped)
        {
            var areas = new List<VfioRegionArea> { new(whole.OffsetBytes, whole.SizeBytes & ~(PageBytes - 1)) };
            if (msix is { } m && m.TableBar == bar) Exclude(areas, m.TableOffset, (ulong)m.TableBytes);
            if (msix is { } p && p.PbaBar == bar) Exclude(areas, p.PbaOffset, (ulong)p.PbaBytes);
            foreach (VfioRegionArea area in areas)
                if (area.SizeBytes > 0) yield return (new GuestRange(new GuestAddress(address + area.OffsetBytes), area.SizeBytes), mapping, area.OffsetBytes - whole.OffsetBytes);
        }
    }

    /// <summary>Cuts the pages of a range out of areas (QEMU: <c>vfio_pci_fixup_msix_region</c>).</summary>
    internal static void Exclude(List<VfioRegionArea> areas, ulong offset, ulong length)
    {
        ulong start = offset & ~(PageBytes - 1), end = (offset + length + PageBytes - 1) & ~(PageBytes - 1);
        for (int i = areas.Count - 1; i >= 0; i--)
        {
            VfioRegionArea area = areas[i];
            if (area.End <= start || area.OffsetBytes >= end) continue;
            areas.RemoveAt(i);
            if (area.End > end) areas.Insert(i, new VfioRegionArea(end, area.End - end));
            if (area.OffsetBytes < start) areas.Insert(i, new VfioRegionArea(area.OffsetBytes, start - area.OffsetBytes));
        }
    }

    private (VfioRegionArea Area, MappedRegion Mapping)? Find(ulong offset, int size)
    {
        foreach ((VfioRegionArea Area, MappedRegion Mapping) m in _mapped)
            if (offset >= m.Area.OffsetBytes && offset + (ulong)size <= m.Area.End) return m;
        return null;
    }
}
