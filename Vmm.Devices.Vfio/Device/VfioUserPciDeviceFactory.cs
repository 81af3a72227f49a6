using Vmm.Core.Devices;
using Vmm.Core.VmStates;
using Vmm.Devices.Vfio.User.Client;

namespace Vmm.Devices.Vfio.Device;

/// <summary>Makes devices of a vfio-user server: <c>vfio-user-pci,socket=PATH</c> (vfio-user 10.5).</summary>
internal sealed class VfioUserPciDeviceFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "vfio-user-pci";

    /// <inheritdoc/>
    public string Summary => "PCI device of a vfio-user server; socket=PATH";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new VfioPciDevice(options, VfioUserDeviceIo.Connect(options, services), services);
}
