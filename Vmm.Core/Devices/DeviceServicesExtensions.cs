using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>Shorter calls for devices.</summary>
public static class DeviceServicesExtensions
{
    /// <summary>Registers a device's state under the name and the priority of its description (QEMU: <c>vmstate_register</c>).</summary>
    /// <param name="services">Services of the device's VM.</param>
    /// <param name="description">Declares the state; its name is the section's.</param>
    /// <param name="owner">The object that save reads and load writes.</param>
    /// <param name="instanceId">Instance id, or <see cref="SaveVmRegistration.AnyInstance"/> for the next free one.</param>
    /// <param name="path">Path of the device on its bus, or null.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="Errors.ConfigurationException">The name and instance are in use or malformed.</exception>
    public static IDisposable RegisterVmState<T>(this IDeviceServices services, VmStateDescription<T> description, T owner,
        int instanceId = SaveVmRegistration.AnyInstance, string? path = null) where T : class
    {
        ArgumentNullException.ThrowIfNull(services);
        return services.SaveVm.RegisterVmState(description, owner, instanceId, path);
    }
}
