using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;

namespace Vmm.Core.Devices;

/// <summary>Collects the plugins, device types and services of a host. One thread, before the container is built.</summary>
public sealed class VmmBuilder
{
    internal VmmBuilder(IServiceCollection services) => Services = services;

    /// <summary>The container; a scoped service exists once per VM.</summary>
    public IServiceCollection Services { get; }

    /// <summary>Adds a plugin; a second call for the same plugin does nothing.</summary>
    public VmmBuilder AddPlugin<TPlugin>() where TPlugin : IVmmPlugin, new()
    {
        if (Services.Any(static d => d.ServiceType == typeof(PluginMarker<TPlugin>))) return this;
        Services.AddSingleton<PluginMarker<TPlugin>>();
        new TPlugin().Configure(this);
        return this;
    }

    /// <summary>Adds a device type.</summary>
    /// <typeparam name="TFactory">Factory of the type; a singleton.</typeparam>
    public VmmBuilder AddDevice<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TFactory>() where TFactory : class, IDeviceFactory
    {
        Services.TryAddEnumerable(ServiceDescriptor.Singleton<IDeviceFactory, TFactory>());
        return this;
    }

    /// <summary>Adds a kind of accelerator.</summary>
    /// <typeparam name="TFactory">Factory of the accelerators; a singleton.</typeparam>
    internal VmmBuilder AddAccelerator<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TFactory>() where TFactory : class, IAcceleratorFactory
    {
        Services.TryAddEnumerable(ServiceDescriptor.Singleton<IAcceleratorFactory, TFactory>());
        return this;
    }

    /// <summary>Adds a part of every machine.</summary>
    /// <typeparam name="TComponent">Type of the part; one instance per VM.</typeparam>
    internal VmmBuilder AddMachineComponent<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TComponent>() where TComponent : class, IMachineComponent
    {
        Services.TryAddEnumerable(ServiceDescriptor.Scoped<IMachineComponent, TComponent>());
        return this;
    }

    private sealed class PluginMarker<TPlugin>;
}
