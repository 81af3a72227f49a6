using Vmm.Core.Devices;

namespace Vmm.Devices.Vfio;

/// <summary>The VFIO device plugin. It registers with the host and has no device type yet.</summary>
public sealed class VfioPlugin : IVmmPlugin
{
    /// <inheritdoc/>
    public void Configure(VmmBuilder builder) => ArgumentNullException.ThrowIfNull(builder);
}
