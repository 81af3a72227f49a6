using Vmm.Core.Devices;
using Vmm.Core.VmStates;
using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Devices.Vfio.Device;

/// <summary>Makes devices of the host: <c>vfio-pci,host=0000:01:00.0</c> or <c>vfio-pci,sysfsdev=PATH</c> (mediated devices too).</summary>
internal sealed class KernelVfioPciDeviceFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "vfio-pci";

    /// <inheritdoc/>
    public string Summary => "PCI device of the host through kernel VFIO; host=ADDRESS or sysfsdev=PATH";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new VfioPciDevice(options, KernelVfioDeviceIo.Open(options, services), services);
}
