using Microsoft.Extensions.Logging;
using Vmm.Core.Cpr;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>A package of device types and services (style: one word on a builder).</summary>
public interface IVmmPlugin
{
    /// <summary>Adds the plugin's factories and services.</summary>
    /// <param name="builder">The host's builder.</param>
    void Configure(VmmBuilder builder);
}

/// <summary>Makes devices of one type.</summary>
public interface IDeviceFactory
{
    /// <summary>The type's name, as in <c>--device TYPE</c>.</summary>
    string TypeName { get; }

    /// <summary>One line for <c>vmm device list</c>.</summary>
    string Summary { get; }

    /// <summary>Declared states of this type's devices, for <c>vmm vmstate dump</c>; empty for a device with roles only.</summary>
    IReadOnlyList<IVmStateDescription> Descriptions { get; }

    /// <summary>Makes and registers a device. BQL: held. On failure nothing is left registered.</summary>
    /// <param name="options">Key-value options; read all, unknown keys are refused by the host afterwards.</param>
    /// <param name="services">The VM's services.</param>
    /// <returns>The device, owned by the VM.</returns>
    IVmDevice Create(DeviceOptions options, IDeviceServices services);
}

/// <summary>A device of a VM. Disposing it unregisters everything it registered.</summary>
public interface IVmDevice : INamedPart, IDisposable
{
    /// <summary>Puts the device into its power-on state. BQL: held.</summary>
    void Reset();
}

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

/// <summary>When a machine component attaches, which fixes its section id.</summary>
public enum MachinePhase
{
    /// <summary>After <c>timer</c>, before any device.</summary>
    BeforeDevices,
    /// <summary>After all devices.</summary>
    AfterDevices,
}

/// <summary>A part of every machine that is not a device, e.g. the <c>ram</c> section. Scoped: one per VM.</summary>
public interface IMachineComponent : IDisposable
{
    /// <summary>When to attach.</summary>
    MachinePhase Phase { get; }

    /// <summary>Registers the component's sections. BQL: held.</summary>
    /// <param name="services">The VM's services.</param>
    void Attach(IDeviceServices services);
}
