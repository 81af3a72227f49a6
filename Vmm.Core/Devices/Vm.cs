using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;

namespace Vmm.Core.Devices;

/// <summary>
/// One virtual machine: memory, run state, devices and its DI scope. Control calls take the BQL themselves; any thread may make them.
/// </summary>
public sealed class Vm : IDisposable
{
    private const int AcceleratorPriority = int.MaxValue / 2;

    private readonly List<IVmDevice> _devices = [];
    private readonly StateHold _hold;
    private readonly Bql _bql;
    private readonly RunStateNotifier _runState;
    private readonly IDeviceServices _deviceServices;
    private readonly IEnumerable<IDeviceFactory> _factories;
    private readonly IEnumerable<IMachineComponent> _components;
    private readonly IEnumerable<IAcceleratorFactory> _accelerators;
    private readonly IServiceProvider _services;
    private readonly List<IDisposable> _registrations = [];
    private IServiceScope? _scope;
    private VmOptions _options = new();
    private bool _disposed;

    /// <summary>Takes the parts from the VM's own scope.</summary>
    internal Vm(IServiceProvider scope)
    {
        _services = scope;
        _deviceServices = scope.GetRequiredService<IDeviceServices>();
        _bql = _deviceServices.Bql;
        _runState = scope.GetRequiredService<RunStateNotifier>();
        _factories = scope.GetServices<IDeviceFactory>();
        _components = scope.GetServices<IMachineComponent>();
        _accelerators = scope.GetServices<IAcceleratorFactory>();
        _hold = new StateHold(_bql);
    }

    /// <summary>What it was made from. <see cref="VmOptions.Cpr"/> is used up.</summary>
    public VmOptions Options => _options;

    /// <summary>Name, or null.</summary>
    public string? Name => _options.Name;

    /// <summary>UUID.</summary>
    public Guid Uuid => _options.Uuid;

    /// <summary>A bus of PCI functions, with a line for each, and nothing else: the least machine of QEMU's that takes PCI devices (QEMU: <c>x-remote</c>).</summary>
    internal const string RemoteMachine = "x-remote";

    private const int RemoteMachineLines = 256;

    /// <summary>Machine type.</summary>
    public string Machine => _options.Machine;

    /// <summary>The lock.</summary>
    public Bql Bql => _bql;

    /// <summary>The run state.</summary>
    public RunStateNotifier RunState => _runState;

    /// <summary>Guest RAM.</summary>
    public GuestMemory Memory => _deviceServices.Memory;

    /// <summary>Sections.</summary>
    public SaveVmRegistry SaveVm => _deviceServices.SaveVm;

    /// <summary>Virtual clock.</summary>
    public VmClock Clock => _deviceServices.Clock;

    /// <summary>The PCI bus, as its CPUs reach it.</summary>
    public PciHost Pci => _deviceServices.Pci;

    /// <summary>What runs the guest, or null.</summary>
    public IAccelerator? Accelerator { get; private set; }

    /// <summary>What the guest asked of its machine.</summary>
    public GuestRequests Requests => _deviceServices.Requests;

    /// <summary>Descriptors that outlive the process.</summary>
    public CprFdTable CprFds => _deviceServices.CprFds;

    /// <summary>Events of its devices.</summary>
    public DeviceEvents Events => _deviceServices.Events;

    /// <summary>Bytes of state that devices have sent themselves in the present migration.</summary>
    public DeviceTransferCounter DeviceTransfer => _deviceServices.DeviceTransfer;

    /// <summary>Devices in the order they were made.</summary>
    public IReadOnlyList<IVmDevice> Devices => _devices;

    /// <summary>The VM's scope, for services that plugins added.</summary>
    public IServiceProvider Services => _services;

    /// <summary>
    /// Whether the VM starts by itself once an incoming migration is done; <c>cont</c> and <c>stop</c> in state inmigrate only change this
    /// (QEMU: <c>autostart</c>).
    /// </summary>
    public bool AutoStart { get; set; } = true;

    /// <summary>Raised after a system reset, BQL held.</summary>
    public event Action? ResetDone;

    /// <summary>Raised once, before anything of the VM is taken apart and without the BQL: whoever uses it must have ended on return.</summary>
    public event Action? Disposing;

    /// <summary>Starts the guest (QEMU: <c>qmp_cont</c>); in state inmigrate only notes the wish.</summary>
    /// <exception cref="DeviceNotActiveException">The state does not allow it; the message is QEMU's.</exception>
    /// <exception cref="DeviceStateException">A device refused, or the VM is another process's; the state is as before.</exception>
    public void Cont()
    {
        using (_hold.Acquire())
        {
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

    /// <summary>Stops the guest (QEMU: <c>qmp_stop</c>); in state inmigrate only notes the wish. Idempotent.</summary>
    /// <exception cref="DeviceStateException">A device failed to stop; the VM is stopped.</exception>
    public void Stop()
    {
        using (_hold.Acquire())
        {
            if (_runState.State == RunStates.RunState.InMigrate) { AutoStart = false; return; }
            if (RunStateTable.IsLive(_runState.State)) _runState.Stop(RunStates.RunState.Paused);
        }
    }

    /// <summary>Resets all devices (QEMU: <c>qemu_system_reset</c>). RAM keeps its contents; a running VM goes on running.</summary>
    /// <exception cref="DeviceStateException">The VM is another process's, or about to be.</exception>
    public void Reset()
    {
        using (_hold.Acquire())
        {
            ThrowIfLeft();
            bool running = _runState.IsRunning;
            if (running) _runState.Stop(RunStates.RunState.Paused);
            ResetDevices();
            Accelerator?.LoadProgram();
            if (RunStateTable.NeedsReset(_runState.State)) _runState.Set(RunStates.RunState.PreLaunch);
            if (running) _runState.Start();
            ResetDone?.Invoke();
        }
    }

    /// <summary>Its memory and devices have not been copied: what is done to them here is done to the VM there.</summary>
    private void ThrowIfLeft()
    {
        if (CprFds.IsLeaving) throw new DeviceStateException("the VM has been handed to another process");
    }

    /// <summary>Puts all devices into their power-on state, before a state is loaded; memory stays as it is. BQL: held.</summary>
    /// <param name="type">Why; a device may make a difference (<see cref="IResetByType"/>).</param>
    public void ResetDevices(ResetType type = ResetType.Cold)
    {
        _bql.AssertHeld();
        foreach (IVmDevice device in _devices)
        {
            if (device is IResetByType typed) typed.Reset(type);
            else device.Reset();
        }
        Accelerator?.Reset();
    }

    /// <summary>
    /// Keeps the state of a stopped VM still for work without the BQL: <see cref="Cont"/>, <see cref="Stop"/>, <see cref="Reset"/> and
    /// <see cref="AddDevice(Func{IDeviceServices, IVmDevice})"/> wait until the result is disposed. BQL: held.
    /// </summary>
    /// <returns>Dispose it on any thread.</returns>
    public IDisposable HoldState() => _hold.Take();

    /// <summary>Adds a device that a host made itself; the VM owns it from here on.</summary>
    /// <param name="create">Makes the device; BQL held.</param>
    /// <returns>The device.</returns>
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
            _devices.Add(device);
            return device;
        }
    }

    /// <summary>Stops the guest, then disposes devices in reverse, components, memory and the scope. Idempotent.</summary>
    public void Dispose()
    {
        // Disposing the scope disposes this object again; only the first call goes on.
        if (_disposed) return;
        _disposed = true;
        Disposing?.Invoke();
        using (_bql.Acquire())
        {
            try
            {
                if (_runState.IsRunning) _runState.Stop(RunStates.RunState.Paused);
            }
            catch (DeviceStateException)
            {
                // The VM is stopped all the same; a device that failed to stop is about to be disposed.
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
            switch (request)
            {
                case GuestRequest.Reset: Reset(); break;
                case GuestRequest.Shutdown: _runState.Stop(RunStates.RunState.Shutdown); break;
                default: _runState.Stop(RunStates.RunState.InternalError); break;
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
