using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>A region of a hosted device.</summary>
public sealed record VfioUserRegion
{
    /// <summary>Index, 0 to 8.</summary>
    public required uint Index { get; init; }

    /// <summary>Bytes; not 0.</summary>
    public required ulong SizeBytes { get; init; }

    /// <summary>Whether it can be written.</summary>
    public bool IsWritable { get; init; } = true;

    /// <summary>Memory that the client may map, or null. The device owns it; it outlives the server.</summary>
    public VfioUserMemory? Memory { get; init; }

    /// <summary>Which parts may be mapped, page aligned; empty with <see cref="Memory"/>: all of it. Never the MSI-X table or PBA.</summary>
    public IReadOnlyList<VfioRegionArea> Areas { get; init; } = [];
}
