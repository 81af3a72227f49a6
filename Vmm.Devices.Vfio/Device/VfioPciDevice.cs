using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// A PCI device of the host, or of a vfio-user server, as a device of the VM: its function on the VM's bus, its interrupts, its reset.
/// <see cref="IVfioDeviceIo"/> hides which of the two it is. BQL: held for every call, except where the function's BARs are accessed (QEMU: <c>vfio-pci</c>).
/// </summary>
internal sealed class VfioPciDevice : IVmDevice, IVfioConfigState
{
    private readonly VfioDeviceAccess _access;
    private readonly VfioPciFunction? _function;
    private readonly IDeviceServices _services;
    private VfioIrqEvent? _error, _request;
    private readonly VfioMigration? _migration;
    private readonly VfioCprPci? _cpr;
    private readonly IDisposable? _runState;
    private IDisposable? _lossBlocker;
    private bool _disposed;

    /// <summary>Makes the device and plugs it. BQL: held.</summary>
    /// <param name="options">Options <c>id</c>, <c>addr</c>, <c>multifunction</c>, <c>x-no-mmap</c>, <c>x-no-kvm-intx</c>, <c>skip-vsc-check</c> and those of the migration.</param>
    /// <param name="io">The open device; owned from here on, and disposed also when this throws.</param>
    /// <param name="services">The VM's services.</param>
    /// <exception cref="ConfigurationException">An option is refused.</exception>
    /// <exception cref="VfioException">The device cannot be shown to a guest.</exception>
    public VfioPciDevice(DeviceOptions options, IVfioDeviceIo io, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(io);
        ArgumentNullException.ThrowIfNull(services);
        (Id, _services) = (options.Id, services);
        _access = new VfioDeviceAccess(Id, io, services.Loggers.CreateLogger<VfioPciDevice>());
        _access.Lost += OnLost;
        try
        {
            VfioPciFunctionOptions o = Read(options, io);
            _function = new VfioPciFunction(o, _access, services);
            _function.Realize(o.NoMmap);
            // When another process has set the device up, the loaded state says which interrupts it uses.
            if (!services.CprFds.IsIncoming && !_function.Irqs.EnableIntx()) throw new VfioException($"device '{Id}' ({io.Name}): INTx cannot be set up", Errno.EINVAL);

            _migration = VfioMigration.Realize(Id, Path, io, this, VfioMigrationOptions.Read(options), services);
            // Registered after the migration's handler, so that a stop takes the pin over while the device still runs and signals.
            _runState = services.RunState.Register(new PinRunState(_function), VfioRunStateHandler.Priority);
            _error = Notifier(VfioPciIrq.Err, "err", OnError);
            _request = Notifier(VfioPciIrq.Req, "req", OnRequest);
            VfioMigration migration = _migration;
            _cpr = new VfioCprPci(Id, Path, io, _function, services) { Interrupts = Listen, Left = _access.Leave, Arrived = () => migration.ReadStateAfterCpr() };
            _migration.IsBypassed = () => _cpr.IsActive;
            // A VM whose device died before it could start does not start; the new process of an update keeps what it was given.
            if (io.LostReason is { } reason && !services.CprFds.IsIncoming) throw new VfioException($"device '{Id}' ({io.Name}) is gone: {reason.Message}", reason.Errno, reason);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <summary>The device.</summary>
    public IVfioDeviceIo Io => _access.Io;

    /// <summary>Its function on the VM's bus.</summary>
    public PciDevice Function => _function!;

    /// <summary>Device path, the prefix of its section names: <c>0000:00:02.0</c>.</summary>
    public string Path => Function.Path;

    /// <summary>True when the device is gone; the guest then reads all ones. Any thread.</summary>
    public bool IsLost => _access.IsLost;

    /// <inheritdoc/>
    public string? LostReason => Io.LostReason is { } reason ? VmmException.Describe(reason) : null;

    /// <inheritdoc/>
    public void Reset(ResetType type)
    {
        // After a check of a stream nothing has to be undone here: a check does not change this device.
        if (type != ResetType.UndoCheck) Reset();
    }

    /// <inheritdoc/>
    public void Reset()
    {
        if (Io.LostReason is not null && Io is IVfioReattach io && _cpr?.IsActive != true) Reattach(io);
        Function.Reset();
        _migration?.OnDeviceReset(_function!.WasReset);
    }

    /// <summary>Why the device cannot migrate, or null.</summary>
    public string? MigrationBlockedReason => _migration?.BlockedReason;

    internal VfioMigration? Migration => _migration;

    /// <inheritdoc/>
    public void ReadShadow() => _function!.ReadShadow();

    /// <inheritdoc/>
    public void TakeSignals() => _function!.TakeSignals();

    /// <inheritdoc/>
    public void SaveConfig(QemuFileWriter f) => _function!.SaveConfig(f);

    /// <inheritdoc/>
    public void LoadConfig(QemuFileReader f, bool apply) => _function!.LoadConfig(f, apply);

    /// <inheritdoc/>
    public void ReapplyAfterReset() => _function!.ReapplyAfterReset();

    /// <summary>Called by an interrupt controller that sees EOIs: the guest has served the pin (QEMU: <c>vfio_intx_eoi</c>).</summary>
    public void IntxEoi() => _function!.Irqs.IntxEoi();

    /// <summary>Unplugs the function, takes its interrupts down and closes the io. The VM is stopped.</summary>
    public void Dispose()
    {
        using (_services.Bql.Acquire())
        {
            if (_disposed) return;
            _disposed = true;
            _access.Lost -= OnLost;
            _lossBlocker?.Dispose();
            _runState?.Dispose();
            _cpr?.Dispose();
            _migration?.Dispose();
            Drop(VfioPciIrq.Req, ref _request);
            Drop(VfioPciIrq.Err, ref _error);
            _function?.Dispose();
            _access.Dispose();
            Io.Dispose();
        }
    }

    private static VfioPciFunctionOptions Read(DeviceOptions options, IVfioDeviceIo io)
    {
        string address = options.GetString("addr", "");
        return new VfioPciFunctionOptions(
            new PciDeviceOptions
            {
                Id = options.Id,
                Address = address.Length > 0 ? address : null,
                // As in QEMU: any size but 256 bytes makes an express function, even mtty's 255.
                IsExpress = io.GetRegionInfo(VfioPciRegion.Config).SizeBytes != PciConfigSpace.LegacyBytes,
                IsMultiFunction = options.GetBool("multifunction", false),
            },
            NoMmap: options.GetBool("x-no-mmap", false),
            NoKvmIntx: options.GetBool("x-no-kvm-intx", false),
            SkipVscCheck: options.GetBool("skip-vsc-check", true));
    }

    private VfioIrqEvent? Notifier(uint index, string name, Action raise)
    {
        if (Io.GetIrqInfo(index).Count == 0) return null;
        var notifier = new VfioIrqEvent(_services, $"{Id}_{name}_notifier", 0, raise);
        if (_access.SetIrqs(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, index, 0, 1, notifier.Fd) == Errno.None) return notifier;
        notifier.Dispose();
        return null;
    }

    private void Listen(bool on)
    {
        _function!.Irqs.Listen(on);
        _error?.Listen(on);
        _request?.Listen(on);
    }

    private void Drop(uint index, ref VfioIrqEvent? notifier)
    {
        if (notifier is null) return;
        _access.SetIrqs(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, index, 0, 1, (OwnedFd?)null);
        notifier.Dispose();
        notifier = null;
    }

    /// <summary>Tells everybody of a lost device: the VM runs on without it, and only its migration does not.</summary>
    private void OnLost(VmmException reason)
    {
        // First without the BQL: whoever has it may wait for another device.
        _services.Events.RaiseLost(Id, reason);
        using (_services.Bql.Acquire())
        {
            if (_disposed || !IsLost) return;
            _lossBlocker ??= _services.Blockers.AddLate($"device '{Id}' ({Io.Name}) is gone: {VmmException.Describe(reason)}", MigrationModes.Normal);
            _function!.FollowLoss();
        }
    }

    /// <summary>A reset brings a lost device back when its server is there again: the guest expects a fresh device now.</summary>
    private void Reattach(IVfioReattach io)
    {
        try
        {
            io.Reattach();
            _access.Return();
            _function!.TakeNewDevice();
            Rebind(VfioPciIrq.Err, _error);
            Rebind(VfioPciIrq.Req, _request);
            _lossBlocker?.Dispose();
            _lossBlocker = null;
            VfioLog.DeviceBack(_access.Logger, Id);
            _services.Events.RaiseReturned(Id);
        }
        catch (VmmException e)
        {
            VfioLog.DeviceStaysLost(_access.Logger, Id, VmmException.Describe(e));
        }
    }

    private void Rebind(uint index, VfioIrqEvent? notifier)
    {
        if (notifier is not null) _access.SetIrqs(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, index, 0, 1, notifier.Fd);
    }

    /// <summary>Stops the VM, because the device may have written to any of the guest's memory (QEMU: <c>vm_stop(RUN_STATE_INTERNAL_ERROR)</c>).</summary>
    private void OnError()
    {
        VfioLog.ErrorInterrupt(_access.Logger, Id);
        if (!_services.RunState.IsRunning) return;
        try
        {
            _services.RunState.Stop(RunState.InternalError);
        }
        catch (DeviceStateException e)
        {
            VfioLog.StopFailed(_access.Logger, Id, e.Message);
        }
    }

    private void OnRequest() => VfioLog.RequestInterrupt(_access.Logger, Id);

    private sealed class PinRunState(VfioPciFunction function) : IVmStateHandler, INamedPart
    {
        public string Id => function.Id;

        public void OnVmStateChange(bool running, RunState state) => function.FollowRunState(running);
    }
}
