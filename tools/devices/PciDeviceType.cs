using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Hosted;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary><c>TYPE,p2p=on|off</c> and the device's own options: serves a device that was written for VMs of this process.</summary>
/// <typeparam name="TPlugin">Its plugin.</typeparam>
/// <param name="factory">Its factory, for the names.</param>
public sealed class PciDeviceType<TPlugin>(IDeviceFactory factory) : IVfioUserDeviceType where TPlugin : IVmmPlugin, new()
{
    public string TypeName => factory.TypeName;

    public string Summary => factory.Summary;

    public IVfioUserBackend Create(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        bool p2p = options.GetBool("p2p", false);
        // The VM refuses what the device does not know, each time it makes one.
        return new PciDeviceBackend(TypeName, static builder => builder.AddPlugin<TPlugin>(), options.Copy, p2p);
    }
}
