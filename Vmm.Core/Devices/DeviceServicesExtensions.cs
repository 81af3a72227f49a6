using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>Shorthands for devices.</summary>
public static class DeviceServicesExtensions
{
    /// <summary>Registers a device's declared state; name and priority are the description's (QEMU: <c>vmstate_register</c>).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="services">The VM's services.</param>
    /// <param name="description">The description.</param>
    /// <param name="owner">The owner.</param>
    /// <param name="instanceId">Instance, or <see cref="SaveVmRegistration.AnyInstance"/>.</param>
    /// <param name="path">Path of the device on its bus, or null.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="Errors.ConfigurationException">The identity is in use or malformed.</exception>
    public static IDisposable RegisterVmState<T>(this IDeviceServices services, VmStateDescription<T> description, T owner,
        int instanceId = SaveVmRegistration.AnyInstance, string? path = null) where T : class
    {
        ArgumentNullException.ThrowIfNull(services);
        return services.SaveVm.RegisterVmState(description, owner, instanceId, path);
    }
}
