using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>Registers declared states.</summary>
public static class VmStateRegistration
{
    /// <summary>Registers an owner's state under its description's name, in its description's priority (QEMU: <c>vmstate_register</c>).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="registry">The VM's registry.</param>
    /// <param name="description">The description.</param>
    /// <param name="owner">The owner.</param>
    /// <param name="instanceId">Instance, or <see cref="SaveVmRegistration.AnyInstance"/>.</param>
    /// <param name="path">Path of the device on its bus, or null; the section is then named <c>path/name</c> and also loads under the bare name.</param>
    /// <param name="aliasId">Another instance id that loads into this owner, or -1.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="Errors.ConfigurationException">The identity is in use or malformed.</exception>
    public static IDisposable RegisterVmState<T>(this SaveVmRegistry registry, VmStateDescription<T> description, T owner,
        int instanceId = SaveVmRegistration.AnyInstance, string? path = null, int aliasId = -1) where T : class
    {
        ArgumentNullException.ThrowIfNull(registry);
        ArgumentNullException.ThrowIfNull(description);
        var registration = new SaveVmRegistration
        {
            IdStr = path is null ? description.Name : $"{path}/{description.Name}",
            CompatIdStr = path is null ? null : description.Name,
            InstanceId = instanceId,
            AliasId = aliasId,
            VersionId = description.VersionId,
            MinimumVersionId = description.MinimumVersionId,
            Priority = description.Priority,
        };
        return registry.Register(registration, description.Bind(owner));
    }
}
