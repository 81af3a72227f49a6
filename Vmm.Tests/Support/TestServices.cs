using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Support;

/// <summary>The services that a VM offers to its devices, without a VM. The test advances the time.</summary>
internal sealed class TestServices : IDeviceServices, IDisposable
{
    public TestServices()
    {
        Clock = new VmClock(Bql, Time);
        Notifier = new RunStateNotifier(Bql);
        SaveVm = new SaveVmRegistry(Bql);
        Pci = new PciHost(Bql, SaveVm, Interrupts);
        Io = new IoBus(Bql, Pci);
        Requests = new GuestRequests(EventFds);
    }

    public ManualTimeProvider Time { get; } = new();

    public Bql Bql { get; } = new();

    public RunStateNotifier Notifier { get; }

    public IRunStateNotifier RunState => Notifier;

    public GuestMemory Memory { get; } = new();

    public VmClock Clock { get; }

    public MigrationBlockers Blockers { get; } = new();

    public MigrationNotifiers Notifiers { get; } = new();

    public SaveVmRegistry SaveVm { get; }

    /// <summary>Records the interrupts that PCI functions raise.</summary>
    public RecordingInterruptController Interrupts { get; } = new();

    public PciHost Pci { get; }

    public IoBus Io { get; }

    public IsaIrqs Irqs { get; } = new();

    public GuestRequests Requests { get; }

    public EventFdLoop EventFds { get; } = new(NullLoggerFactory.Instance);

    public ILoggerFactory Loggers { get; init; } = NullLoggerFactory.Instance;

    public DeviceEvents Events { get; } = new();

    public DeviceTransferCounter DeviceTransfer { get; } = new();

    public CprFdTable CprFds { get; } = new();

    public IAccelerator? Accelerator { get; init; }

    public IServiceProvider Scope { get; init; } = new ServiceCollection().BuildServiceProvider();

    public void Dispose()
    {
        Requests.Dispose();
        EventFds.Dispose();
        Memory.Dispose();
    }
}
