using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Stops and starts the device with the VM (vfio-migration 3.3; QEMU: <c>vfio_vmstate_change_prepare</c>, <c>vfio_vmstate_change</c>). With
/// P2P all devices first stop DMA to each other, then all work. When a step fails the device is reset and the change of the run state reports an
/// error, so that a migration under way fails.
/// </summary>
internal sealed class VfioRunStateHandler(VfioMigration migration) : IVmStateHandler, INamedPart
{
    /// <summary>Depth of a PCI device in the tree of devices: it starts after its bus and stops before it.</summary>
    internal const int Priority = 3;

    private IVfioMigrationProtocol Protocol => migration.Protocol!;

    public string Id => migration.Id;

    public void OnVmStatePrepare(bool running, RunState state)
    {
        if (migration.IsBypassed() || (Protocol.Flags & VfioMigrationFlags.P2P) == 0) return;
        if (!running && VfioStateArcs.IsPrecopy(Protocol.State))
        {
            Protocol.BeforePrecopyStops();
            if (migration.Options.MigrationEvents) migration.RaiseEvent("pre-copy-p2p-prepare");
            Protocol.SetState(VfioDeviceState.PreCopyP2P, VfioDeviceState.Error);
            return;
        }
        Protocol.SetState(VfioDeviceState.RunningP2P, VfioDeviceState.Error);
    }

    public void OnVmStateChange(bool running, RunState state)
    {
        if (migration.IsBypassed()) return;
        if (running)
        {
            if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{Id}' is broken; reset the VM", Errno.EIO);
            Protocol.SetState(VfioDeviceState.Running, VfioDeviceState.Error);
            return;
        }
        if ((Protocol.Flags & VfioMigrationFlags.P2P) == 0) Protocol.BeforePrecopyStops();
        VfioDeviceState target = Protocol.StopTarget(state);
        // The last moment to read registers: in STOP_COPY the device must not be accessed.
        if (target == VfioDeviceState.StopCopy) migration.Config.ReadShadow();
        Protocol.SetState(target, VfioDeviceState.Error);
        migration.Config.TakeSignals();
    }
}
