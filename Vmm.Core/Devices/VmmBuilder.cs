using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;

namespace Vmm.Core.Devices;

/// <summary>Collects plugins, device types and services of a VMM host.</summary>
public sealed class VmmBuilder
{
    internal VmmBuilder(IServiceCollection services) => Services = services;

    /// <summary>The container; scoped services are one per VM.</summary>
    public IServiceCollection Services { get; }

    /// <summary>Adds a plugin; adding one twice is the same as once.</summary>
    /// <typeparam name="TPlugin">The plugin.</typeparam>
    /// <returns>This.</returns>
    public VmmBuilder AddPlugin<TPlugin>() where TPlugin : IVmmPlugin, new()
    {
        if (Services.Any(static d => d.ServiceType == typeof(PluginMarker<TPlugin>))) return this;
        Services.AddSingleton<PluginMarker<TPlugin>>();
        new TPlugin().Configure(this);
        return this;
    }

    /// <summary>Adds a device type.</summary>
    /// <typeparam name="TFactory">Its factory; a singleton.</typeparam>
    /// <returns>This.</returns>
    public VmmBuilder AddDevice<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TFactory>() where TFactory : class, IDeviceFactory
    {
        Services.TryAddEnumerable(ServiceDescriptor.Singleton<IDeviceFactory, TFactory>());
        return this;
    }

    /// <summary>Adds a kind of accelerator.</summary>
    /// <typeparam name="TFactory">Its factory; a singleton.</typeparam>
    /// <returns>This.</returns>
    internal VmmBuilder AddAccelerator<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TFactory>() where TFactory : class, IAcceleratorFactory
    {
        Services.TryAddEnumerable(ServiceDescriptor.Singleton<IAcceleratorFactory, TFactory>());
        return this;
    }

    /// <summary>Adds a part of every machine.</summary>
    /// <typeparam name="TComponent">The component; one per VM.</typeparam>
    /// <returns>This.</returns>
    internal VmmBuilder AddMachineComponent<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TComponent>() where TComponent : class, IMachineComponent
    {
        Services.TryAddEnumerable(ServiceDescriptor.Scoped<IMachineComponent, TComponent>());
        return this;
    }

    private sealed class PluginMarker<TPlugin>;
}
