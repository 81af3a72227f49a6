using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Protocol v1: state bits and data in a region (vfio-migration 5; QEMU 5.2 to 7.2's <c>hw/vfio/migration.c</c>). Its states are named
/// with v2's words: 0 STOP, 1 RUNNING, 2 STOP_COPY, 3 PRE_COPY, 4 RESUMING. A lock keeps state changes out of a data copy.
/// </summary>
internal sealed class VfioMigrationV1 : IVfioMigrationProtocol
{
    private const uint Running = VfioMigrationRegion.Running, Saving = VfioMigrationRegion.Saving, Resuming = VfioMigrationRegion.Resuming;

    /// <summary>Data are copied between region and stream in pieces of this size.</summary>
    internal const int BufferBytes = 1 << 20;

    private readonly IVfioDeviceIo _io;
    private readonly IVfioConfigState _config;
    private readonly VfioMigrationRegion _region;
    private readonly DeviceTransferCounter _transfer;
    private readonly VfioSessionSlot _session;
    private volatile VfioDeviceState _state = VfioDeviceState.Running;

    internal VfioMigrationV1(IVfioDeviceIo io, IVfioConfigState config, VfioRegionInfo region, DeviceTransferCounter transfer)
    {
        (_io, _config, _transfer) = (io, config, transfer);
        _region = new VfioMigrationRegion(io, region);
        _session = new VfioSessionSlot(io.Name);
    }

    public event Action<VfioDeviceState>? StateChanged;

    public int Version => 1;

    public VfioMigrationFlags Flags => VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy;

    public VfioDeviceState State => _state;

    public bool CanUseThreads => false;

    /// <summary>Held for each state change and for each copy of data.</summary>
    internal Lock Gate { get; } = new();

    public IVfioSaveSession OpenSave(bool switchoverAck) => _session.OpenNew(() => new VfioSaveV1(this, _region, _transfer));

    public IVfioLoadSession OpenLoad() => _session.OpenNew(() => new VfioLoadV1(this, _region));

    /// <summary>A device that is being saved goes on being saved; a snapshot begins with the stop (QEMU 7.2: <c>vfio_vmstate_change</c>).</summary>
    public VfioDeviceState StopTarget(RunState state) =>
        VfioStateArcs.IsSaving(_state) || state == RunState.SaveVm ? VfioDeviceState.StopCopy : VfioDeviceState.Stop;

    public void SetState(VfioDeviceState target, VfioDeviceState recoverTo)
    {
        if (_state == target) return;
        (uint mask, uint value) = target switch
        {
            VfioDeviceState.Running => (~VfioMigrationRegion.StateMask, Running),
            VfioDeviceState.PreCopy => (~0u, Saving),
            VfioDeviceState.StopCopy => (~Running, Saving),
            VfioDeviceState.Stop => (~(Running | Saving), 0u),
            VfioDeviceState.Resuming => (~VfioMigrationRegion.StateMask, Resuming),
            _ => throw new VfioException($"device '{_io.Name}' speaks protocol v1, which has no {target.ToName()}", Errno.EINVAL),
        };
        VfioDeviceState from = _state;
        if (from == VfioDeviceState.Error) throw new VfioException($"device '{_io.Name}' is broken: it must be reset before it can go to {target.ToName()}", Errno.EIO);
        lock (Gate)
        {
            Errno errno = Write(mask, value, out bool isBroken);
            if (errno == Errno.None)
            {
                Enter(target);
                return;
            }
            if (_io.LostReason is { } gone)
            {
                Enter(VfioDeviceState.Error);
                throw new VfioException($"device '{_io.Name}' is gone, so it did not go from {from.ToName()} to {target.ToName()}", errno, gone);
            }
            string what = $"device '{_io.Name}' refused to go from {from.ToName()} to {target.ToName()} ({errno})";
            // v1 has no recovery arc: a refused write leaves the state as it was. Only a device that reports itself broken is reset.
            if (!isBroken) throw new VfioException($"{what}; it is in {from.ToName()} now", errno);
            Errno reset = _io.Reset();
            if (reset != Errno.None)
            {
                Enter(VfioDeviceState.Error);
                throw new VfioException($"{what}, and could not be reset ({reset}): it is broken", errno);
            }
            Enter(VfioDeviceState.Running);
            _config.ReapplyAfterReset();
            throw new VfioException($"{what}; the device was reset", errno);
        }
    }

    public void OnReset() => Enter(VfioDeviceState.Running);

    public void OnResetFailed()
    {
        lock (Gate)
        {
            if (_region.ReadState(out uint state) == Errno.None && !VfioMigrationRegion.IsError(state) && (state & Resuming) == 0
                && ((state & Saving) == 0 || Write(~(Running | Saving), 0, out _) == Errno.None))
                Enter((state & (Running | Saving)) == Running ? VfioDeviceState.Running : VfioDeviceState.Stop);
            else
                Enter(VfioDeviceState.Error);
        }
    }

    public void BeforePrecopyStops()
    {
    }

    public void Dispose() => (_session.Open as IDisposable)?.Dispose();

    /// <summary>Ends a session.</summary>
    internal void Close(object session) => _session.Close(session);

    public void ReadState()
    {
        if (_region.ReadState(out uint state) == Errno.None && (state & VfioMigrationRegion.StateMask) is 0 or Running)
            Enter((state & Running) != 0 ? VfioDeviceState.Running : VfioDeviceState.Stop);
    }

    /// <summary>Read-modify-write of the state (vfio-migration 5.2): reserved bits stay, what is invalid is not written.</summary>
    private Errno Write(uint mask, uint value, out bool isBroken)
    {
        isBroken = false;
        Errno errno = _region.ReadState(out uint state);
        if (errno != Errno.None) return errno;
        uint next = (state & mask) | value;
        if (!VfioMigrationRegion.IsValid(next)) return Errno.EINVAL;
        errno = _region.WriteState(next);
        if (errno == Errno.None) return errno;
        isBroken = _region.ReadState(out uint now) != Errno.None || VfioMigrationRegion.IsError(now);
        return errno;
    }

    private void Enter(VfioDeviceState state)
    {
        VfioDeviceState before = _state;
        _state = state;
        if (before != state) StateChanged?.Invoke(state);
    }
}
