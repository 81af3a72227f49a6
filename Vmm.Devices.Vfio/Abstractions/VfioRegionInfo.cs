namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Region flags (uapi: <c>VFIO_REGION_INFO_FLAG_*</c>).</summary>
[Flags]
public enum VfioRegionFlags : uint
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>Readable.</summary>
    Read = 1,
    /// <summary>Writable.</summary>
    Write = 2,
    /// <summary>Mappable, wholly or in the areas listed.</summary>
    Mmap = 4,
}

/// <summary>A mappable part of a region.</summary>
/// <param name="OffsetBytes">Bytes from the start of the region; page aligned.</param>
/// <param name="SizeBytes">Length in bytes; a multiple of the page size, not 0.</param>
public readonly record struct VfioRegionArea(ulong OffsetBytes, ulong SizeBytes)
{
    /// <summary>Offset of the first byte behind the area (exclusive end).</summary>
    public ulong End => OffsetBytes + SizeBytes;
}

/// <summary>Region info with its capabilities decoded (vfio-migration 1.5). Everything was bounds-checked by the backend.</summary>
public sealed record VfioRegionInfo
{
    /// <summary>Index.</summary>
    public required uint Index { get; init; }

    /// <summary>Flags.</summary>
    public VfioRegionFlags Flags { get; init; }

    /// <summary>Size in bytes; 0 when the region is absent.</summary>
    public ulong SizeBytes { get; init; }

    /// <summary>Mappable areas in the device's order, which need not be sorted. A wholly mappable region has one; no area is empty.</summary>
    public IReadOnlyList<VfioRegionArea> Areas { get; init; } = [];

    /// <summary>TYPE capability's type, or 0.</summary>
    public uint Type { get; init; }

    /// <summary>TYPE capability's subtype.</summary>
    public uint Subtype { get; init; }

    /// <summary>The page of the MSI-X table may be mapped.</summary>
    public bool IsMsixMappable { get; init; }

    /// <summary>Whether the device has the region.</summary>
    public bool IsPresent => SizeBytes > 0;
}
