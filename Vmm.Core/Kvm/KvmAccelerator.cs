using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;

namespace Vmm.Core.Kvm;

/// <summary>
/// Runs a VM's guest with KVM: memory slots that follow the address map, vCPU threads between start and stop, interrupts of PCI and ISA devices,
/// the dirty log, QEMU's sections of the interrupt chips, <c>kvm-clock</c> and one <c>kvm-cpu</c> for each vCPU. BQL: held for every call.
/// </summary>
internal sealed class KvmAccelerator : IAccelerator, IKvmVcpuHost, IInterruptController
{
    internal const uint FirstIntxIrq = 20; // I/O APIC pins 20 to 23, which no ISA device uses.

    private readonly KvmSystem _system;
    private readonly KvmVm _vm;
    private readonly List<KvmVcpu> _vcpus = [];
    private readonly List<KvmCpuState> _states = [], _powerOn = [];
    private readonly List<IDisposable> _registrations = [];
    private readonly IDeviceServices _services;
    private readonly KvmDirtyRings? _rings;
    private readonly KvmBoot? _boot;
    private readonly KvmClock _powerOnClock; // The clock before the first instruction, which a reset restores.
    private readonly KvmIrqChips _powerOnChips;
    private readonly ILogger _logger;
    private readonly LegacyDevices _legacy;
    private bool _hasNoProgram, _wasStarted;

    internal KvmAccelerator(VmOptions options, IDeviceServices services)
    {
        if (options.Kernel is null && !options.IsIncoming)
            throw new ConfigurationException("accelerator 'kvm' has no firmware: the guest needs a kernel, unless it comes from another process");
        if (options.Cpus is < 1 or > 64) throw new ConfigurationException($"{options.Cpus} vCPUs: expected 1 to 64");
        _services = services;
        _logger = services.Loggers.CreateLogger<KvmAccelerator>();
        _boot = options.Kernel is { } kernel ? KvmBoot.Read(kernel, services.Memory, options.Cpus) : null;
        _system = KvmSystem.Open();
        try
        {
            _vm = new KvmVm(_system, options.DirtyRingEntries);
        }
        catch
        {
            _system.Dispose();
            throw;
        }
        Clock = new KvmClock(_vm);
        Chips = new KvmIrqChips(_vm, services.Clock);
        _powerOnClock = new KvmClock(_vm);
        _powerOnChips = new KvmIrqChips(_vm, services.Clock);
        try
        {
            Paths = new KvmPaths(_vm);
            for (int i = 0; i < options.Cpus; i++) _vcpus.Add(new KvmVcpu(_vm, i, this));
            foreach (KvmVcpu vcpu in _vcpus)
            {
                _states.Add(new KvmCpuState(vcpu, options.Cpus, _vm, Clock));
                _powerOn.Add(new KvmCpuState(vcpu, options.Cpus, _vm, _powerOnClock));
                _powerOn[^1].Save();
            }
            _powerOnChips.Get();
            _registrations.Add(services.Memory.AddListener(_vm));
            _rings = options.DirtyRingEntries > 0 ? new KvmDirtyRings(_vm, _vcpus, _logger) : null;
            _registrations.Add(services.Memory.AddDirtyLogSource(_rings is null ? new KvmDirtyLog(_vm) : _rings));
            if (services.Scope.GetService(typeof(InterruptRouter)) is InterruptRouter router) _registrations.Add(router.Attach(this));
            if (services.Scope.GetService(typeof(CpuThrottle)) is CpuThrottle throttle) _registrations.Add(new KvmThrottle(throttle, _vcpus));
            _registrations.Add(services.Irqs.Attach((line, level) => _vm.SetIrqLine((uint)line, level)));
            _legacy = new LegacyDevices(services);
            _registrations.Add(_legacy);
            _registrations.Add(services.RegisterVmState(KvmClock.Description, Clock, 0));
            _registrations.AddRange(Chips.Register(services));
            foreach (KvmCpuState state in _states) _registrations.Add(services.RegisterVmState(KvmCpuState.Description, state));
            if (!options.IsIncoming) _boot?.Load(_vcpus[0]);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public string Name => KvmAcceleratorFactory.KvmName;

    /// <inheritdoc/>
    public Bql Bql => _services.Bql;

    /// <inheritdoc/>
    public IoBus Io => _services.Io;

    internal KvmVm Vm => _vm;

    internal IReadOnlyList<KvmVcpu> Vcpus => _vcpus;

    internal IReadOnlyList<KvmCpuState> CpuStates => _states;

    internal KvmClock Clock { get; }

    internal KvmIrqChips Chips { get; }

    internal KvmPaths Paths { get; }

    internal KvmDirtyRings? Rings => _rings;

    /// <summary>Duration of the last stop, from the request until all vCPUs were parked.</summary>
    internal TimeSpan LastStop { get; private set; }

    /// <inheritdoc/>
    public GuestRunTimes RunTimes => new(MonotonicClock.ToNs(_vcpus.Min(static v => v.EnteredAt)), MonotonicClock.ToNs(_vcpus.Max(static v => v.LeftAt)));

    /// <summary>Why a vCPU cannot go on, or null.</summary>
    internal KvmException? Failure { get; private set; }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state)
    {
        if (running)
        {
            if (_hasNoProgram) throw new DeviceStateException("the guest was reset, and this process has no kernel to start it with: an incoming VM needs the kernel too");
            _wasStarted = true;
            Clock.StartClock();
            foreach (KvmVcpu vcpu in _vcpus) vcpu.TellPaused();
            foreach (KvmVcpu vcpu in _vcpus) vcpu.Start();
            foreach (KvmVcpu vcpu in _vcpus) vcpu.WaitEntered();
            return;
        }
        // A start that another handler has ended stops vCPUs that never ran; their clocks stand still already.
        if (!_wasStarted) return;
        _wasStarted = false;
        StopVcpus();
        Chips.Pit.NoteClock();
    }

    private void StopVcpus()
    {
        long start = Stopwatch.GetTimestamp();
        RealtimeBoost.During(true, () =>
        {
            foreach (KvmVcpu vcpu in _vcpus) vcpu.RequestStop();
            foreach (KvmVcpu vcpu in _vcpus) vcpu.WaitParked();
            LastStop = Stopwatch.GetElapsedTime(start);
        });
    }

    /// <inheritdoc/>
    public void Reset()
    {
        _legacy.Reset();
        _powerOnChips.Set();
        foreach (KvmCpuState state in _powerOn) state.Load();
        _hasNoProgram = false;
    }

    /// <inheritdoc/>
    public void LoadProgram()
    {
        _hasNoProgram = _boot is null;
        _boot?.Load(_vcpus[0]);
    }

    /// <inheritdoc/>
    public void OnVcpuStopped(KvmVcpu vcpu, KvmException? error)
    {
        Failure ??= error;
        if (error is not null) CoreLog.VcpuStopped(_logger, error.Message);
        _services.Requests.Post(error is null ? GuestRequest.Reset : GuestRequest.InternalError);
    }

    /// <inheritdoc/>
    public IMsiRoute? AddMsiRoute(OwnedFd trigger) => Paths.AddMsiRoute(trigger);

    /// <inheritdoc/>
    public IDisposable? AddIrqFd(int line, OwnedFd trigger, OwnedFd resample)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)line, (uint)PciHost.IntxLines, nameof(line));
        return _system.Extension(KvmUapi.KVM_CAP_IRQFD_RESAMPLE) > 0 ? _vm.AttachIrqfd(FirstIntxIrq + (uint)line, trigger, resample) : null;
    }

    /// <inheritdoc/>
    public IDisposable? AddIoEventFd(IoEventFdRange at, OwnedFd target) => Paths.AddIoEventFd(at, target);

    /// <inheritdoc/>
    public IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes) => Paths.MapMmio(range, region, offsetBytes);

    /// <inheritdoc/>
    public void OnDirtyRingFull() => _rings?.OnRingFull();

    /// <inheritdoc/>
    public void SetIntx(int line, bool level) => _vm.SetIrqLine(FirstIntxIrq + (uint)line, level);

    /// <inheritdoc/>
    public void SendMsi(MsiMessage message, ushort requesterId) => _vm.SignalMsi(message);

    /// <inheritdoc/>
    public void Dispose()
    {
        StopVcpus();
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
        foreach (KvmVcpu vcpu in _vcpus) vcpu.Dispose();
        _vcpus.Clear();
        _vm.Dispose();
        _system.Dispose();
    }
}

/// <summary>Makes <see cref="KvmAccelerator"/>s.</summary>
internal sealed class KvmAcceleratorFactory : IAcceleratorFactory
{
    internal const string KvmName = "kvm";

    /// <inheritdoc/>
    public string Name => KvmName;

    /// <inheritdoc/>
    public VmmException? Probe()
    {
        try
        {
            KvmSystem.Open().Dispose();
            return null;
        }
        catch (KvmException e)
        {
            return e;
        }
    }

    /// <inheritdoc/>
    public IAccelerator Create(VmOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(services);
        return new KvmAccelerator(options, services);
    }
}

/// <summary>Adds the accelerator <c>kvm</c>.</summary>
public sealed class KvmPlugin : IVmmPlugin
{
    /// <summary>Tries whether this process may use KVM.</summary>
    /// <returns>Null, or why not: <c>/dev/kvm</c> is missing, closed to this user, or too old.</returns>
    public static VmmException? Probe() => new KvmAcceleratorFactory().Probe();

    /// <inheritdoc/>
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddAccelerator<KvmAcceleratorFactory>();
    }
}
