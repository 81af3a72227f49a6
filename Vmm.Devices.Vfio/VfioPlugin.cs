using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;
using Vmm.Core.Devices;
using Vmm.Devices.Vfio.Device;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Devices.Vfio;

/// <summary>The VFIO device plugin: device types <c>vfio-pci</c> and <c>vfio-user-pci</c>, and what the VFIO devices of one VM share.</summary>
public sealed class VfioPlugin : IVmmPlugin
{
    /// <inheritdoc/>
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.Services.TryAddScoped<VfioMigrationHost>();
        builder.AddDevice<KernelVfioPciDeviceFactory>().AddDevice<VfioUserPciDeviceFactory>();
        builder.Services.TryAddSingleton<IVfioKernel, KernelVfio>();
        builder.Services.TryAddSingleton(new VfioHostPaths());
        builder.Services.TryAddScoped<VfioContainers>();
    }
}
