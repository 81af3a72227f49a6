using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>Makes devices of one type.</summary>
public interface IDeviceFactory
{
    /// <summary>The type's name, as in <c>--device TYPE</c>.</summary>
    string TypeName { get; }

    /// <summary>One line for <c>vmm device list</c>.</summary>
    string Summary { get; }

    /// <summary>Declared states of this type's devices, for <c>vmm vmstate dump</c>; empty for a device with roles only.</summary>
    IReadOnlyList<IVmStateDescription> Descriptions { get; }

    /// <summary>Makes and registers a device. BQL: held. On failure nothing is left registered.</summary>
    /// <param name="options">Key-value options; read all, unknown keys are refused by the host afterwards.</param>
    /// <param name="services">The VM's services.</param>
    /// <returns>The device, owned by the VM.</returns>
    IVmDevice Create(DeviceOptions options, IDeviceServices services);
}
