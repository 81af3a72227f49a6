using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>A region of a hosted device.</summary>
public sealed record VfioUserRegion
{
    /// <summary>Region index, 0 to 8.</summary>
    public required uint Index { get; init; }

    /// <summary>Size in bytes; not 0.</summary>
    public required ulong SizeBytes { get; init; }

    /// <summary>Whether clients may write to the region.</summary>
    public bool IsWritable { get; init; } = true;

    /// <summary>Memory that the client may map, or null. Owned by the device, which disposes it after the server.</summary>
    public VfioUserMemory? Memory { get; init; }

    /// <summary>Parts of <see cref="Memory"/> that may be mapped, page aligned; empty for all of it. Must not contain the MSI-X table or pending bits.</summary>
    public IReadOnlyList<VfioRegionArea> Areas { get; init; } = [];
}
