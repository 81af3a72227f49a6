using Microsoft.Extensions.Logging;
using Vmm.Core.Cpr;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>Services of a VM for its devices. One per VM; any thread, but each service has rules of its own.</summary>
public interface IDeviceServices
{
    /// <summary>The run state, and handlers of its changes.</summary>
    IRunStateNotifier RunState { get; }

    /// <summary>Guest RAM.</summary>
    GuestMemory Memory { get; }

    /// <summary>The VM's big lock.</summary>
    Bql Bql { get; }

    /// <summary>The VM's clock.</summary>
    VmClock Clock { get; }

    /// <summary>Reasons why the VM cannot migrate.</summary>
    MigrationBlockers Blockers { get; }

    /// <summary>Notifies devices of the stages of a migration.</summary>
    MigrationNotifiers Notifiers { get; }

    /// <summary>Registry of the VM's sections.</summary>
    SaveVmRegistry SaveVm { get; }

    /// <summary>The VM's PCI bus.</summary>
    PciHost Pci { get; }

    /// <summary>I/O ports and memory-mapped registers.</summary>
    IoBus Io { get; }

    /// <summary>Interrupt lines of legacy devices.</summary>
    internal IsaIrqs Irqs { get; }

    /// <summary>Requests of the guest to its machine.</summary>
    internal GuestRequests Requests { get; }

    /// <summary>Watches eventfds on one thread per VM.</summary>
    EventFdLoop EventFds { get; }

    /// <summary>Makes loggers.</summary>
    ILoggerFactory Loggers { get; }

    /// <summary>Events for management.</summary>
    DeviceEvents Events { get; }

    /// <summary>Counts the bytes of state that devices sent themselves in the present migration.</summary>
    DeviceTransferCounter DeviceTransfer { get; }

    /// <summary>The accelerator, with its direct paths between devices and guest; null if the VM has none.</summary>
    IAccelerator? Accelerator => (Scope.GetService(typeof(CurrentAccelerator)) as CurrentAccelerator)?.Value;

    /// <summary>Descriptors that outlive the process.</summary>
    CprFdTable CprFds { get; }

    /// <summary>The VM's scope, for scoped services that plugins register and share between their devices.</summary>
    IServiceProvider Scope { get; }

    /// <summary>Registers a device's declared state; name and priority are the description's (QEMU: <c>vmstate_register</c>).</summary>
    /// <typeparam name="T">Type of the owner.</typeparam>
    /// <param name="description">Says which fields of the owner the section has; shared by all owners.</param>
    /// <param name="owner">The object whose fields are saved and loaded.</param>
    /// <param name="instanceId">Tells owners of one description apart; <see cref="SaveVmRegistration.AnyInstance"/> takes one more than the highest.</param>
    /// <param name="path">Path of the device on its bus, or null; the section is then named <c>path/name</c> and also loads under the bare name.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="ArgumentException">The description violates a rule of the format.</exception>
    /// <exception cref="Errors.ConfigurationException">The identity is in use or malformed.</exception>
    IDisposable RegisterVmState<T>(VmStateDescription<T> description, T owner, int instanceId = SaveVmRegistration.AnyInstance, string? path = null)
        where T : class => SaveVm.RegisterVmState(description, owner, instanceId, path);
}
