using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Stops and starts the device with the VM (vfio-migration 3.3; QEMU: <c>vfio_vmstate_change_prepare</c>, <c>vfio_vmstate_change</c>). With
/// P2P all devices first stop DMA to each other, then all work. When a stop fails the device is reset; when a start fails it goes back to STOP with its
/// state. Both report an error, so that a migration under way fails.
/// </summary>
internal sealed class VfioRunStateHandler(VfioMigration migration) : IVmStateHandler, INamedPart
{
    /// <summary>Depth of a PCI device in the tree of devices: it starts after its bus and stops before it.</summary>
    internal const int Priority = 3;

    private IVfioMigrationProtocol Protocol => migration.Protocol!;

    public string Id => migration.Id;

    public void ThrowIfCannotStart()
    {
        if (migration.IsBypassed()) return;
        migration.ThrowIfLost();
        ThrowIfBroken();
    }

    public void OnVmStatePrepare(bool running, RunState state)
    {
        if (IsOut || (Protocol.Flags & VfioMigrationFlags.P2P) == 0) return;
        if (running) ThrowIfBroken();
        if (!running && VfioStateArcs.IsPrecopy(Protocol.State))
        {
            Protocol.BeforePrecopyStops();
            if (migration.Options.MigrationEvents) migration.RaiseEvent("pre-copy-p2p-prepare");
            SetState(VfioDeviceState.PreCopyP2P, VfioDeviceState.Error);
            return;
        }
        SetState(VfioDeviceState.RunningP2P, running ? VfioDeviceState.Stop : VfioDeviceState.Error);
    }

    public void OnVmStateChange(bool running, RunState state)
    {
        if (IsOut) return;
        if (running)
        {
            ThrowIfBroken();
            // A device that refuses to start keeps its state, which may be the only copy of it, and the start can be tried again.
            SetState(VfioDeviceState.Running, VfioDeviceState.Stop);
            return;
        }
        if ((Protocol.Flags & VfioMigrationFlags.P2P) == 0) Protocol.BeforePrecopyStops();
        VfioDeviceState target = Protocol.StopTarget(state);
        // The last moment to read registers: in STOP_COPY the device must not be accessed.
        if (target == VfioDeviceState.StopCopy) migration.Config.ReadShadow();
        SetState(target, VfioDeviceState.Error);
        migration.Config.TakeSignals();
    }

    /// <summary>Whether the device has no part in the change: another process has it, or it is lost, and the VM starts and stops without it.</summary>
    private bool IsOut => migration.IsBypassed() || migration.Io.LostReason is not null;

    private void ThrowIfBroken()
    {
        if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{Id}' is broken; reset the VM", Errno.EIO);
    }

    /// <summary>A device that is lost on the way is no reason why the VM cannot start or stop. An attempt to save it fails by itself.</summary>
    private void SetState(VfioDeviceState target, VfioDeviceState recoverTo)
    {
        try
        {
            Protocol.SetState(target, recoverTo);
        }
        catch (VfioException) when (migration.Io.LostReason is not null)
        {
            // The loss has been logged and told.
        }
    }
}
