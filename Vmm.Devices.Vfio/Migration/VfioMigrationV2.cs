using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Protocol v2: states by DEVICE_FEATURE, data by descriptor or message (vfio-migration 2 and 3; QEMU 8.0 to 11.1's
/// <c>hw/vfio/migration.c</c>). A lock of its own keeps a read from meeting the end of its session; it is taken after the BQL and nothing is
/// called under it but the device. Moves from socket to socket do without: nobody changes the state of a device in STOP_COPY or RESUMING meanwhile.
/// </summary>
internal sealed partial class VfioMigrationV2 : IVfioMigrationProtocol
{
    /// <summary>Longest data record (QEMU: <c>VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE</c>).</summary>
    internal const int MaxBufferBytes = 1 << 20;

    /// <summary>A device that answers 0 to the size query still needs room for a read (vfio-migration 3.4).</summary>
    internal const int MinBufferBytes = 64 << 10;

    private readonly IVfioDeviceIo _io;
    private readonly IVfioConfigState _config;
    private readonly bool _precopyInfoV2;
    private readonly DeviceTransferCounter _transfer;
    private readonly Lock _gate = new();
    private IVfioMigrationData? _data;
    private byte[]? _buffer;
    private volatile VfioDeviceState _state = VfioDeviceState.Running;

    /// <summary>Makes the protocol for a device in RUNNING.</summary>
    /// <param name="io">The device; not owned.</param>
    /// <param name="config">Applied again after a reset.</param>
    /// <param name="flags">What it can do.</param>
    /// <param name="precopyInfoV2">Feature 12 is set, so that REINIT means something.</param>
    /// <param name="transfer">Counts data sent.</param>
    internal VfioMigrationV2(IVfioDeviceIo io, IVfioConfigState config, VfioMigrationFlags flags, bool precopyInfoV2, DeviceTransferCounter transfer)
    {
        _transfer = transfer;
        _io = io;
        _config = config;
        _precopyInfoV2 = precopyInfoV2;
        Flags = flags;
    }

    public event Action<VfioDeviceState>? StateChanged;

    public int Version => 2;

    public VfioMigrationFlags Flags { get; }

    public VfioDeviceState State => _state;

    private bool HasPrecopy => (Flags & VfioMigrationFlags.PreCopy) != 0;

    public VfioDeviceState StopTarget(RunState state) =>
        VfioStateArcs.IsPrecopy(_state) && state is RunState.FinishMigrate or RunState.Paused ? VfioDeviceState.StopCopy : VfioDeviceState.Stop;

    public void SetState(VfioDeviceState target, VfioDeviceState recoverTo)
    {
        if (_state == target) return;
        if (_state == VfioDeviceState.Error) throw new VfioException($"device '{_io.Name}' is broken: it must be reset before it can go to {target.ToName()}", Errno.EIO);
        VfioDeviceState from = _state;
        Errno errno = Ask(target);
        if (errno == Errno.None) return;
        string what = $"device '{_io.Name}' refused to go from {from.ToName()} to {target.ToName()} ({Name(errno)})";
        if (recoverTo != VfioDeviceState.Error && Ask(recoverTo) == Errno.None)
            throw new VfioException($"{what}; it is in {recoverTo.ToName()} now", errno);
        Errno reset = _io.Reset();
        if (reset != Errno.None)
        {
            CloseData();
            Enter(VfioDeviceState.Error);
            throw new VfioException($"{what}, and could not be reset ({Name(reset)}): it is broken", errno);
        }
        OnReset();
        _config.ReapplyAfterReset();
        throw new VfioException($"{what}; the device was reset", errno);
    }

    /// <summary>Asks the device where it is.</summary>
    internal void ReadState()
    {
        if (_io.GetMigrationState(out VfioDeviceState state) == Errno.None && state != _state) Enter(state);
    }

    public void OnReset()
    {
        CloseData();
        Enter(VfioDeviceState.Running);
    }

    public void Dispose() => CloseData();

    /// <summary>One request. A session that the device opens replaces none: two at once mean that device and VMM disagree.</summary>
    private Errno Ask(VfioDeviceState target)
    {
        Errno errno = _io.SetMigrationState(target, out IVfioMigrationData? data);
        if (errno != Errno.None)
        {
            data?.Dispose();
            return errno;
        }
        bool isOutOfSync;
        IVfioMigrationData? ended = null;
        lock (_gate)
        {
            // Between saving and resuming the device passes STOP, where the old session ended.
            isOutOfSync = data is not null && _data is not null && VfioStateArcs.IsSaving(_state) == VfioStateArcs.IsSaving(target);
            if (isOutOfSync) ended = data;
            else if (data is not null) (ended, _data) = (_data, data);
            else if (!VfioStateArcs.HasData(target)) (ended, _data) = (_data, null);
        }
        ended?.Dispose();
        Enter(target);
        return isOutOfSync ? Errno.EBADF : Errno.None;
    }

    private void Enter(VfioDeviceState state)
    {
        VfioDeviceState before = _state;
        _state = state;
        if (before != state) StateChanged?.Invoke(state);
    }

    private void CloseData()
    {
        IVfioMigrationData? data;
        lock (_gate) (data, _data) = (_data, null);
        data?.Dispose();
    }

    private static string Name(Errno errno) => Enum.IsDefined(errno) ? errno.ToString() : $"errno {(int)errno}";
}
