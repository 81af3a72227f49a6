using Microsoft.Extensions.Logging;
using Vmm.Core.Cpr;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;

namespace Vmm.Core.Devices;

/// <summary>What a VM offers to its devices. One per VM.</summary>
public interface IDeviceServices
{
    /// <summary>Run state and its handlers.</summary>
    IRunStateNotifier RunState { get; }

    /// <summary>Guest RAM.</summary>
    GuestMemory Memory { get; }

    /// <summary>The VM's big lock.</summary>
    Bql Bql { get; }

    /// <summary>The VM's clock.</summary>
    VmClock Clock { get; }

    /// <summary>Reasons why the VM cannot migrate.</summary>
    MigrationBlockers Blockers { get; }

    /// <summary>Moments of a migration.</summary>
    MigrationNotifiers Notifiers { get; }

    /// <summary>The section registry.</summary>
    SaveVmRegistry SaveVm { get; }

    /// <summary>The VM's PCI bus.</summary>
    PciHost Pci { get; }

    /// <summary>Ports and memory-mapped registers that vCPUs reach.</summary>
    IoBus Io { get; }

    /// <summary>Interrupt lines of legacy devices.</summary>
    IsaIrqs Irqs { get; }

    /// <summary>What the guest asks of its machine.</summary>
    GuestRequests Requests { get; }

    /// <summary>Watches eventfds, on one thread per VM.</summary>
    EventFdLoop EventFds { get; }

    /// <summary>Loggers.</summary>
    ILoggerFactory Loggers { get; }

    /// <summary>Events for the management.</summary>
    DeviceEvents Events { get; }

    /// <summary>Bytes of state that devices have sent themselves in the present migration.</summary>
    DeviceTransferCounter DeviceTransfer { get; }

    /// <summary>What runs the guest, and its short ways for devices; null without one.</summary>
    IAccelerator? Accelerator => (Scope.GetService(typeof(CurrentAccelerator)) as CurrentAccelerator)?.Value;

    /// <summary>Descriptors that outlive the process.</summary>
    CprFdTable CprFds { get; }

    /// <summary>The VM's scope, for what plugins registered as scoped services and share between their devices.</summary>
    IServiceProvider Scope { get; }
}
