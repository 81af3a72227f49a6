using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// A device that changes process: its section carries the function's state while the device itself runs on (vfio-migration 7.5 to 7.7; QEMU:
/// <c>vfio_cpr_pci_vmstate</c>). The section exists in modes cpr-transfer and cpr-exec only; the section <c>/vfio</c> does not exist then, and
/// the device's migration state is left alone. BQL: held for every call.
/// </summary>
internal sealed class VfioCprPci : ISaveState, ILoadState, IDisposable
{
    private const MigrationModes Modes = MigrationModes.CprTransfer | MigrationModes.CprExec;
    private readonly List<IDisposable> _registrations = [];
    private readonly IVfioCprIo? _io;
    private readonly VfioPciFunction _function;
    private readonly IDeviceServices _services;
    private bool _leaving;

    /// <summary>Registers the section, or a blocker that says why there is none.</summary>
    /// <exception cref="MigrationBlockedException">A blocker is needed and a migration runs.</exception>
    internal VfioCprPci(string id, string path, IVfioDeviceIo io, VfioPciFunction function, IDeviceServices services)
    {
        (_io, _function, _services) = (io as IVfioCprIo, function, services);
        if (io is KernelVfioDeviceIo) _registrations.Add(services.Notifiers.Add(what => OnReboot(what, id), MigrationModes.CprReboot));
        string? reason = _io is null ? "its descriptors cannot be handed to another process" : _io.CprBlockedReason;
        if (reason is not null)
        {
            _io = null;
            _registrations.Add(services.Blockers.Add($"device '{id}' ({io.Name}): {reason}", Modes));
            return;
        }
        _io!.EnterCpr(services.CprFds, id);
        _registrations.Add(services.SaveVm.Register(
            new SaveVmRegistration { IdStr = $"{path}/vfio-cpr-pci", InstanceId = 0, VersionId = 0, MinimumVersionId = 0 },
            SaveVmHandlers.Of(this) with { IsActive = () => IsActive }));
        _registrations.Add(services.Notifiers.Add(OnMigration, Modes));
        services.CprFds.Arrived += OnArrived;
        if (services.CprFds.IsIncoming) services.EventFds.Prepare();
    }

    /// <summary>True while the device is being handed from or to another process.</summary>
    internal bool IsActive => _leaving || _services.CprFds.IsIncoming;

    /// <summary>Called in the new process when it may use the device again, before the VM starts.</summary>
    internal Action? Arrived { get; init; }

    /// <summary>Called when the device finally belongs to another process.</summary>
    internal Action? Left { get; init; }

    /// <summary>Called with false to let interrupts collect in their eventfds, with true to take them again.</summary>
    internal required Action<bool> Interrupts { get; init; }

    /// <inheritdoc/>
    public void SaveState(QemuFileWriter f)
    {
        _io!.SuspendCpr();
        _function.SaveCpr(f);
    }

    /// <inheritdoc/>
    public void LoadState(QemuFileReader f, int versionId)
    {
        _function.LoadCpr(f);
        _io!.LoadCpr();
    }

    public void Dispose()
    {
        _services.CprFds.Arrived -= OnArrived;
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
    }

    private void OnMigration(MigrationEvent what)
    {
        switch (what)
        {
            case MigrationEvent.PrecopySetup:
                _leaving = true;
                Interrupts(false);
                break;
            case MigrationEvent.PrecopyDone:
                _io!.HandOverCpr();
                Left?.Invoke();
                break;
            default:
                if (!_leaving) break;
                // The VM goes on in this process in any case.
                try
                {
                    _io!.ResumeCpr();
                }
                finally
                {
                    _leaving = false;
                    Interrupts(true);
                }
                break;
        }
    }

    /// <summary>The guest's driver must have suspended the device, because the state has nothing of it (QEMU: <c>vfio_cpr_reboot_notifier</c>).</summary>
    private void OnReboot(MigrationEvent what, string id)
    {
        if (what != MigrationEvent.PrecopySetup || _services.RunState is { State: RunState.Suspended } or { WasSuspended: true }) return;
        throw new MigrationBlockedException($"device '{id}': a VFIO device supports cpr-reboot only while the guest is suspended");
    }

    private void OnArrived()
    {
        try
        {
            _io!.ResumeCpr();
        }
        finally
        {
            Interrupts(true);
            Arrived?.Invoke();
        }
    }
}
