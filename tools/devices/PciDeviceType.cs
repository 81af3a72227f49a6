using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Hosted;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>Serves a device that was written for VMs of this process: <c>TYPE,p2p=on|off</c> and the device's own options.</summary>
/// <typeparam name="TPlugin">The plugin that adds the device.</typeparam>
/// <param name="factory">The device's factory, which gives name and summary.</param>
public sealed class PciDeviceType<TPlugin>(IDeviceFactory factory) : IVfioUserDeviceType where TPlugin : IVmmPlugin, new()
{
    public string TypeName => factory.TypeName;

    public string Summary => factory.Summary;

    public IVfioUserBackend Create(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        bool p2p = options.GetBool("p2p", false);
        // Each VM that makes the device refuses the options that the device does not know.
        return new PciDeviceBackend(TypeName, static builder => builder.AddPlugin<TPlugin>(), options.Copy, p2p);
    }
}
