using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>Makes devices of one type. One object serves all VMs; any thread.</summary>
public interface IDeviceFactory
{
    /// <summary>Name of the type, as in <c>--device TYPE</c>.</summary>
    string TypeName { get; }

    /// <summary>One line for <c>vmm device list</c>.</summary>
    string Summary { get; }

    /// <summary>Declared states of this type's devices, for <c>vmm vmstate dump</c>; empty if the devices have none.</summary>
    IReadOnlyList<IVmStateDescription> Descriptions { get; }

    /// <summary>Makes and registers a device. A failure leaves nothing registered. BQL: held.</summary>
    /// <param name="options">Options of the device; read all that the type knows, because the caller refuses those that nobody read.</param>
    /// <param name="services">Services of the device's VM.</param>
    /// <returns>The device; the VM owns it.</returns>
    /// <exception cref="Errors.VmmException">An option is refused, or what the device needs is not there.</exception>
    IVmDevice Create(DeviceOptions options, IDeviceServices services);
}
