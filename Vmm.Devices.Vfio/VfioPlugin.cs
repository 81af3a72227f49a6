using Microsoft.Extensions.DependencyInjection.Extensions;
using Vmm.Core.Devices;
using Vmm.Devices.Vfio.Device;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Devices.Vfio;

/// <summary>The VFIO device plugin.</summary>
public sealed class VfioPlugin : IVmmPlugin
{
    /// <inheritdoc/>
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.Services.TryAddScoped<VfioMigrationHost>();
        builder.AddDevice<VfioUserPciDeviceFactory>();
    }
}
