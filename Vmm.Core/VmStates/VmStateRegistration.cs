using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>Registers declared states.</summary>
internal static class VmStateRegistration
{
    /// <summary>Registers an owner's state under the name and the priority of its description (QEMU: <c>vmstate_register</c>).</summary>
    /// <param name="registry">Registry of the owner's VM.</param>
    /// <param name="description">Declares the state; its name is the section's.</param>
    /// <param name="owner">The object that save reads and load writes.</param>
    /// <param name="instanceId">Instance id, or <see cref="SaveVmRegistration.AnyInstance"/> for one more than the highest.</param>
    /// <param name="path">Path of the device on its bus, or null; with a path the section is named <c>path/name</c> and also loads under its bare name.</param>
    /// <param name="aliasId">A second instance id that loads into this owner, or -1.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="Errors.ConfigurationException">The name and instance are in use or malformed.</exception>
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
