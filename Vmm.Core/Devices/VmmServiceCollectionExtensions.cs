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

/// <summary>Adds the VMM to a container.</summary>
public static class VmmServiceCollectionExtensions
{
    /// <summary>Adds <see cref="VmFactory"/> and the services of each VM.</summary>
    /// <returns>A builder for plugins and devices.</returns>
    public static VmmBuilder AddVmm(this IServiceCollection services)
    {
        ArgumentNullException.ThrowIfNull(services);
        services.TryAddSingleton<ILoggerFactory>(NullLoggerFactory.Instance);
        services.TryAddSingleton<VmFactory>();
        services.TryAddScoped<Bql>();
        services.TryAddScoped<IRunStateNotifier, RunStateNotifier>();
        services.TryAddScoped<GuestMemory>();
        services.TryAddScoped<SaveVmRegistry>();
        services.TryAddScoped<MigrationBlockers>();
        services.TryAddScoped<MigrationNotifiers>();
        services.TryAddScoped<CprFdTable>();
        services.TryAddScoped<VmClock>();
        services.TryAddScoped<DeviceEvents>();
        services.TryAddScoped<DeviceTransferCounter>();
        services.TryAddScoped<CpuThrottle>();
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
        services.TryAddScoped(static scope => new Vm(scope));
        return new VmmBuilder(services);
    }

    private sealed record DeviceServices(IRunStateNotifier RunState, GuestMemory Memory, Bql Bql, VmClock Clock, MigrationBlockers Blockers,
        MigrationNotifiers Notifiers, SaveVmRegistry SaveVm, PciHost Pci, IoBus Io, IsaIrqs Irqs, GuestRequests Requests, EventFdLoop EventFds, ILoggerFactory Loggers, DeviceEvents Events,
        DeviceTransferCounter DeviceTransfer, CprFdTable CprFds, IServiceProvider Scope) : IDeviceServices;
}
