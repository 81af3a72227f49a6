using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Vmm.Core.Cpr;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;

namespace Vmm.Core.Devices;

/// <summary>
/// One virtual machine: memory, run state, devices and its DI scope. Control calls take the BQL themselves; any thread may call them.
/// </summary>
public sealed class Vm : IDisposable
{
    private const int AcceleratorPriority = int.MaxValue / 2;

    private readonly List<IVmDevice> _devices = [];
    private readonly StateHold _hold;
    private readonly Bql _bql;
    private readonly IRunStateNotifier _runState;
    private readonly IDeviceServices _deviceServices;
    private readonly IEnumerable<IDeviceFactory> _factories;
    private readonly IEnumerable<IMachineComponent> _components;
    private readonly IEnumerable<IAcceleratorFactory> _accelerators;
    private readonly IServiceProvider _services;
    private readonly List<IDisposable> _registrations = [];
    private IServiceScope? _scope;
    private VmOptions _options = new();
    private bool _disposed;
    private Task _ended = Task.CompletedTask;

    /// <summary>Takes the parts from the VM's own scope.</summary>
    internal Vm(IServiceProvider scope)
    {
        _services = scope;
        _deviceServices = scope.GetRequiredService<IDeviceServices>();
        _bql = _deviceServices.Bql;
        _runState = _deviceServices.RunState;
        _factories = scope.GetServices<IDeviceFactory>();
        _components = scope.GetServices<IMachineComponent>();
        _accelerators = scope.GetServices<IAcceleratorFactory>();
        _hold = new StateHold(_bql);
        CpuThrottle = scope.GetRequiredService<CpuThrottle>();
    }

    /// <summary>Options that the VM was made from. <see cref="VmOptions.Cpr"/> has been consumed.</summary>
    public VmOptions Options => _options;

    /// <summary>Name of the VM, or null.</summary>
    public string? Name => _options.Name;

    /// <summary>UUID of the VM; all zero if none was set.</summary>
    public Guid Uuid => _options.Uuid;

    /// <summary>
    /// The smallest of QEMU's machines with PCI devices: a PCI bus with an interrupt line for each function, and nothing else (QEMU: <c>x-remote</c>).
    /// </summary>
    internal const string RemoteMachine = "x-remote";

    private const int RemoteMachineLines = 256;

    /// <summary>Machine type.</summary>
    public string Machine => _options.Machine;

    /// <summary>The VM's big lock.</summary>
    public Bql Bql => _bql;

    /// <summary>The run state.</summary>
    public IRunStateNotifier RunState => _runState;

    /// <summary>Guest RAM.</summary>
    public GuestMemory Memory => _deviceServices.Memory;

    /// <summary>Registry of the VM's sections.</summary>
    public SaveVmRegistry SaveVm => _deviceServices.SaveVm;

    /// <summary>The VM's virtual clock.</summary>
    public VmClock Clock => _deviceServices.Clock;

    /// <summary>The PCI bus, as the vCPUs reach it.</summary>
    public PciHost Pci => _deviceServices.Pci;

    /// <summary>Runs the guest; null without an accelerator.</summary>
    public IAccelerator? Accelerator { get; private set; }

    /// <summary>Requests of the guest to its machine.</summary>
    internal GuestRequests Requests => _deviceServices.Requests;

    /// <summary>Takes processor time from the guest.</summary>
    internal CpuThrottle CpuThrottle { get; }

    /// <summary>Descriptors that outlive the process.</summary>
    public CprFdTable CprFds => _deviceServices.CprFds;

    /// <summary>Events of the VM's devices.</summary>
    public DeviceEvents Events => _deviceServices.Events;

    /// <summary>Counts the bytes of state that devices sent themselves in the present migration.</summary>
    public DeviceTransferCounter DeviceTransfer => _deviceServices.DeviceTransfer;

    /// <summary>Devices in the order of their creation. BQL: held while devices may come.</summary>
    public IReadOnlyList<IVmDevice> Devices => _devices;

    /// <summary>The VM's scope, for services that plugins added.</summary>
    public IServiceProvider Services => _services;

    /// <summary>
    /// True if the VM starts when an incoming migration is complete. In state inmigrate, <c>cont</c> and <c>stop</c> only change this value
    /// (QEMU: <c>autostart</c>). BQL: held for writes.
    /// </summary>
    public bool AutoStart { get; set; } = true;

    /// <summary>Raised after a system reset. BQL: held.</summary>
    public event Action? ResetDone;

    /// <summary>Raised once, before the VM disposes anything. When a handler returns, its owner must not use the VM any more. BQL: not held.</summary>
    public event Action? Disposing;

    /// <summary>
    /// Why this VM must not run: a migration ended without this side learning whether the other side has the VM. Null as a rule. Any thread.
    /// </summary>
    public string? HeldBecause { get; private set; }

    /// <summary>Holds a stopped VM until an operator decides (<see cref="HeldBecause"/>). BQL: held.</summary>
    internal void Hold(string reason)
    {
        _bql.AssertHeld();
        HeldBecause = reason;
    }

    /// <summary>Throws if the VM is held (<see cref="HeldBecause"/>).</summary>
    internal void ThrowIfHeld()
    {
        if (HeldBecause is { } reason) throw new DeviceStateException(reason) { Hint = "if no other side runs this VM, start it with 'cont --force' (QMP: cont with \"x-force\": true); else quit" };
    }

    /// <summary>Starts the guest (QEMU: <c>qmp_cont</c>); in state inmigrate only sets <see cref="AutoStart"/>.</summary>
    /// <exception cref="DeviceStateException">
    /// The run state does not allow a start, a device refused, another process has the VM, it is held, or a snapshot is under way and the caller holds the BQL; the
    /// run state has not changed.
    /// </exception>
    public void Cont() => Cont(force: false);

    /// <summary>As <see cref="Cont()"/>.</summary>
    /// <param name="force">
    /// True to start a VM that is held (<see cref="HeldBecause"/>): the caller knows that no other side runs it. Two that run destroy each other's data.
    /// </param>
    /// <exception cref="DeviceStateException">
    /// The run state does not allow a start, a device refused, another process has the VM, it is held, or a snapshot is under way and the caller holds the BQL; the
    /// run state has not changed.
    /// </exception>
    public void Cont(bool force)
    {
        using (_hold.Acquire())
        {
            if (force) Release();
            ThrowIfLeft();
            switch (_runState.State)
            {
                case RunStates.RunState.InMigrate: AutoStart = true; return;
                case RunStates.RunState.FinishMigrate: throw new DeviceStateException("Migration is not finalized yet");
                case RunStates.RunState.InternalError or RunStates.RunState.Shutdown: throw new DeviceStateException("Resetting the Virtual Machine is required");
                default: _runState.Start(); return;
            }
        }
    }

    /// <summary>Stops the guest (QEMU: <c>qmp_stop</c>); in state inmigrate only clears <see cref="AutoStart"/>. Idempotent.</summary>
    /// <exception cref="DeviceStateException">
    /// A device failed to stop, and the VM has stopped nevertheless; or a snapshot is under way and the caller holds the BQL, and nothing has changed.
    /// </exception>
    public void Stop()
    {
        using (_hold.Acquire())
        {
            if (_runState.State == RunStates.RunState.InMigrate) { AutoStart = false; return; }
            if (RunStateTable.IsLive(_runState.State)) _runState.Stop(RunStates.RunState.Paused);
        }
    }

    /// <summary>
    /// Resets all devices (QEMU: <c>qemu_system_reset</c>). RAM keeps its content; a running VM runs afterwards. A device that fails to stop is reset like
    /// the others.
    /// </summary>
    /// <exception cref="DeviceStateException">
    /// Another process has the VM, or is about to take it; or a device could not be reset or started, and the VM stays stopped.
    /// </exception>
    public void Reset()
    {
        using (_hold.Acquire())
        {
            ThrowIfLeft();
            bool running = _runState.IsRunning;
            if (running) StopForReset();
            ResetDevices();
            Accelerator?.LoadProgram();
            if (RunStateTable.NeedsReset(_runState.State)) _runState.Set(RunStates.RunState.PreLaunch);
            if (running) _runState.Start();
            ResetDone?.Invoke();
        }
    }

    /// <summary>Ends a hold by an operator's word.</summary>
    private void Release()
    {
        if (HeldBecause is null) return;
        HeldBecause = null;
        CprFds.IsLeaving = false;
        CprFds.EndIncoming();
    }

    private void StopForReset()
    {
        try
        {
            _runState.Stop(RunStates.RunState.Paused);
        }
        catch (DeviceStateException)
        {
            // The VM has stopped nevertheless. The reset gives the device that failed a state that is known again.
        }
    }

    /// <summary>
    /// Throws if the other side of a migration may have the VM, or another process takes it: both processes share memory and devices then, so a change here
    /// would change the VM there.
    /// </summary>
    private void ThrowIfLeft()
    {
        ThrowIfHeld();
        if (CprFds.IsLeaving) throw new DeviceStateException("the VM has been handed to another process");
    }

    /// <summary>Resets all devices, e.g. before a load; memory keeps its content. BQL: held.</summary>
    /// <param name="type">The reason, for devices that distinguish (<see cref="IVmDevice.Reset(ResetType)"/>).</param>
    /// <exception cref="DeviceStateException">A device failed; the others and the accelerator have been reset.</exception>
    public void ResetDevices(ResetType type = ResetType.Cold)
    {
        _bql.AssertHeld();
        DeviceStateException? first = null;
        foreach (IVmDevice device in _devices)
        {
            try
            {
                device.Reset(type);
            }
#pragma warning disable CA1031 // One device that fails must not keep the state of all those after it; its exception is reported with its name.
            catch (Exception e)
#pragma warning restore CA1031
            {
                first ??= new DeviceStateException($"device '{device.Id}' could not be reset: {e.Message}", e);
            }
        }
        Accelerator?.Reset();
        if (first is not null) throw first;
    }

    /// <summary>
    /// Freezes the state of a stopped VM for work without the BQL: <see cref="Cont()"/>, <see cref="Stop"/>, <see cref="Reset"/> and
    /// <see cref="AddDevice(Func{IDeviceServices, IVmDevice})"/> wait until the result is disposed. BQL: held.
    /// </summary>
    /// <returns>Dispose on any thread to release the state.</returns>
    /// <exception cref="InvalidOperationException">The state is held already.</exception>
    public IDisposable HoldState() => _hold.Take();

    /// <summary>Adds a device that the host makes itself; the VM owns it.</summary>
    /// <param name="create">Makes the device. BQL: held.</param>
    /// <returns>The device.</returns>
    /// <exception cref="ConfigurationException">The id is in use; the device has been disposed.</exception>
    /// <exception cref="DeviceStateException">A snapshot is under way and the caller holds the BQL.</exception>
    public IVmDevice AddDevice(Func<IDeviceServices, IVmDevice> create)
    {
        ArgumentNullException.ThrowIfNull(create);
        using (_hold.Acquire())
        {
            IVmDevice device = create(_deviceServices);
            if (_devices.Exists(d => d.Id == device.Id))
            {
                device.Dispose();
                throw new ConfigurationException($"device id '{device.Id}' is in use");
            }
            if (_options.OnlyMigratable && SaveVm.Entries().Any(static e => e.VmState is { IsMigratable: false }))
            {
                device.Dispose();
                throw new ConfigurationException($"Device {device.Id} is not migratable, but --only-migratable was specified");
            }
            _devices.Add(device);
            return device;
        }
    }

    /// <summary>Makes <see cref="Dispose"/> return at once and do its work behind a task. For a handler of <see cref="Disposing"/>; the task must not fault.</summary>
    internal void DisposeAfter(Task ended) => _ended = ended;

    /// <summary>
    /// Stops the guest, then disposes devices in reverse order, components, memory and the scope. Idempotent. Called inside a callback of a running migration,
    /// it cancels the migration and returns at once; the rest follows when the migration has ended. One thread, without the BQL.
    /// </summary>
    public void Dispose()
    {
        // The scope disposes this object again; only the first call does the work.
        if (_disposed) return;
        _disposed = true;
        Disposing?.Invoke();
        if (_ended.IsCompleted) DisposeParts();
        else _ended.ContinueWith(_ => DisposeParts(), CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default);
    }

    private void DisposeParts()
    {
        // A snapshot works on devices without the BQL: they go only when it has ended.
        using (_hold.Acquire())
        {
            try
            {
                if (_runState.IsRunning) _runState.Stop(RunStates.RunState.Paused);
            }
            catch (DeviceStateException)
            {
                // The VM has stopped nevertheless, and the device that failed is disposed next.
            }
            for (int i = _devices.Count - 1; i >= 0; i--) _devices[i].Dispose();
            _devices.Clear();
            Accelerator?.Dispose();
            for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        }
        _scope?.Dispose();
    }

    internal void Realize(VmOptions options, IServiceScope scope)
    {
        if (options.Machine is not ("none" or RemoteMachine)) throw new ConfigurationException($"machine '{options.Machine}' is not known; known: none, {RemoteMachine}");
        _options = options;
        AutoStart = options.AutoStart;
        _deviceServices.Blockers.OnlyMigratable = options.OnlyMigratable;
        if (options.Cpr is not null) CprFds.Receive(options.Cpr);
        foreach (RamBlockOptions block in options.Memory) AddMemory(block);
        using (_bql.Acquire())
        {
            if (options.IsIncoming) _runState.Set(RunStates.RunState.InMigrate);
            if (options.Machine == RemoteMachine) _deviceServices.Pci.SavedLines = RemoteMachineLines;
            IMachineComponent[] all = [.. _components];
            _registrations.Add(_runState.Register(Clock, VmClock.HandlerPriority));
            _registrations.Add(Clock.Register(SaveVm));
            foreach (IMachineComponent c in all.Where(static c => c.Phase == MachinePhase.BeforeDevices)) c.Attach(_deviceServices);
            AddAccelerator(options);
            foreach (DeviceOptions device in options.Devices) AddDevice(device);
            foreach (IMachineComponent c in all.Where(static c => c.Phase == MachinePhase.AfterDevices)) c.Attach(_deviceServices);
        }
        _scope = scope;
    }

    private void AddAccelerator(VmOptions options)
    {
        IAcceleratorFactory? factory = options.Accelerator switch
        {
            "none" => null,
            "auto" => options.Kernel is null ? null : Working(),
            _ => _accelerators.FirstOrDefault(f => f.Name == options.Accelerator)
                ?? throw new ConfigurationException($"accelerator '{options.Accelerator}' is not known; known: auto, none, {string.Join(", ", _accelerators.Select(static f => f.Name))}"),
        };
        if (factory is null)
        {
            if (options.Kernel is { } kernel) throw new ConfigurationException($"kernel '{kernel.KernelPath}': nothing can run it without an accelerator");
            return;
        }
        Accelerator = _services.GetRequiredService<CurrentAccelerator>().Value = factory.Create(options, _deviceServices);
        // vCPUs start after all devices and stop before them.
        _registrations.Add(_runState.Register(Accelerator, AcceleratorPriority));
        _deviceServices.Requests.Attach(OnGuestRequest);
    }

    private IAcceleratorFactory Working()
    {
        VmmException? first = null;
        foreach (IAcceleratorFactory factory in _accelerators)
        {
            if (factory.Probe() is not { } why) return factory;
            first ??= why;
        }
        throw first ?? new ConfigurationException("no accelerator is installed");
    }

    private void OnGuestRequest(GuestRequest request)
    {
        using (_bql.Acquire())
        {
            if (_disposed || !_runState.IsRunning) return;
            try
            {
                switch (request)
                {
                    case GuestRequest.Reset: Reset(); break;
                    case GuestRequest.Shutdown: _runState.Stop(RunStates.RunState.Shutdown); break;
                    default: _runState.Stop(RunStates.RunState.InternalError); break;
                }
            }
            catch (DeviceStateException e)
            {
                // The caller would drop the handler, and with it every later request of the guest.
                CoreLog.GuestRequestFailed(_deviceServices.Loggers.CreateLogger<Vm>(), request.ToString(), e.Message, _runState.State.ToWireName());
            }
        }
    }

    private void AddMemory(RamBlockOptions options)
    {
        RamBlock block = _deviceServices.Memory.AddBlock(options with { Inherited = CprFds.Take(options.Name, 0) }, aroundDevices: _options.HasCpus);
        if (block.IsShared) _registrations.Add(CprFds.Save(block.Name, 0, block.Fd));
        else _registrations.Add(_deviceServices.Blockers.Add($"Memory region {block.Name} is not compatible with CPR", MigrationModes.CprTransfer | MigrationModes.CprExec));
    }

    private void AddDevice(DeviceOptions options)
    {
        IDeviceFactory factory = _factories.FirstOrDefault(f => f.TypeName == options.TypeName)
            ?? throw new ConfigurationException($"device type '{options.TypeName}' is not known; known: {string.Join(", ", _factories.Select(static f => f.TypeName).Order())}");
        AddDevice(s =>
        {
            IVmDevice device = factory.Create(options, s);
            try
            {
                options.ThrowIfUnused();
                return device;
            }
            catch
            {
                device.Dispose();
                throw;
            }
        });
    }
}
