using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Cpr;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;

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
    public VmmBuilder AddAccelerator<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TFactory>() where TFactory : class, IAcceleratorFactory
    {
        Services.TryAddEnumerable(ServiceDescriptor.Singleton<IAcceleratorFactory, TFactory>());
        return this;
    }

    /// <summary>Adds a part of every machine.</summary>
    /// <typeparam name="TComponent">The component; one per VM.</typeparam>
    /// <returns>This.</returns>
    public VmmBuilder AddMachineComponent<[System.Diagnostics.CodeAnalysis.DynamicallyAccessedMembers(
        System.Diagnostics.CodeAnalysis.DynamicallyAccessedMemberTypes.PublicConstructors)] TComponent>() where TComponent : class, IMachineComponent
    {
        Services.TryAddEnumerable(ServiceDescriptor.Scoped<IMachineComponent, TComponent>());
        return this;
    }

    private sealed class PluginMarker<TPlugin>;
}

/// <summary>Entry point of the host.</summary>
public static class VmmServiceCollectionExtensions
{
    /// <summary>Adds the VMM core: <see cref="VmFactory"/> and the per-VM services.</summary>
    /// <param name="services">The container.</param>
    /// <returns>A builder for plugins and devices.</returns>
    public static VmmBuilder AddVmm(this IServiceCollection services)
    {
        ArgumentNullException.ThrowIfNull(services);
        services.TryAddSingleton<ILoggerFactory>(NullLoggerFactory.Instance);
        services.TryAddSingleton<VmFactory>();
        services.TryAddScoped<Bql>();
        services.TryAddScoped<RunStateNotifier>();
        services.TryAddScoped<IRunStateNotifier>(static s => s.GetRequiredService<RunStateNotifier>());
        services.TryAddScoped<GuestMemory>();
        services.TryAddScoped<SaveVmRegistry>();
        services.TryAddScoped<MigrationBlockers>();
        services.TryAddScoped<MigrationNotifiers>();
        services.TryAddScoped<CprFdTable>();
        services.TryAddScoped<VmClock>();
        services.TryAddScoped<DeviceEvents>();
        services.TryAddScoped<DeviceTransferCounter>();
        services.TryAddScoped<InterruptRouter>();
        services.TryAddScoped<IInterruptController>(static s => s.GetRequiredService<InterruptRouter>());
        services.TryAddScoped<IPciDma, GuestPciDma>();
        services.TryAddScoped<PciHost>();
        services.TryAddScoped<EventFdLoop>();
        services.TryAddScoped<IoBus>();
        services.TryAddScoped<IsaIrqs>();
        services.TryAddScoped<GuestRequests>();
        services.TryAddScoped<CurrentAccelerator>();
        services.TryAddScoped<IDeviceServices, DeviceServices>();
        services.TryAddScoped<Vm>();
        return new VmmBuilder(services);
    }

    private sealed record DeviceServices(IRunStateNotifier RunState, GuestMemory Memory, Bql Bql, VmClock Clock, MigrationBlockers Blockers,
        MigrationNotifiers Notifiers, SaveVmRegistry SaveVm, PciHost Pci, IoBus Io, IsaIrqs Irqs, GuestRequests Requests, EventFdLoop EventFds, ILoggerFactory Loggers, DeviceEvents Events,
        DeviceTransferCounter DeviceTransfer, CprFdTable CprFds, IServiceProvider Scope) : IDeviceServices;
}
