using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Protocol v2: states by DEVICE_FEATURE, data by descriptor or message (vfio-migration 2 and 3; QEMU 8.0 to 11.1's
/// <c>hw/vfio/migration.c</c>). A lock keeps the data descriptor open while it is read or written; it ranks below the BQL, and only the device
/// is called under it. Moves from socket to socket need no lock, because nobody changes the state of a device in STOP_COPY or RESUMING.
/// </summary>
internal sealed class VfioMigrationV2 : IVfioMigrationProtocol
{
    /// <summary>Longest data record (QEMU: <c>VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE</c>).</summary>
    internal const int MaxBufferBytes = 1 << 20;

    /// <summary>A device that answers 0 to the size query still needs room for a read (vfio-migration 3.4).</summary>
    internal const int MinBufferBytes = 64 << 10;

    private readonly IVfioDeviceIo _io;
    private readonly IVfioConfigState _config;
    private readonly DeviceTransferCounter _transfer;
    private readonly VfioSessionSlot _session;
    private readonly Lock _gate = new();
    private IVfioMigrationData? _data;
    private volatile VfioDeviceState _state = VfioDeviceState.Running;

    /// <summary>Makes the protocol for a device in RUNNING.</summary>
    /// <param name="io">The device; not owned.</param>
    /// <param name="config">Applied again after a reset.</param>
    /// <param name="flags">What it can do.</param>
    /// <param name="precopyInfoV2">Feature 12 is set, so that REINIT means something.</param>
    /// <param name="transfer">Counts data sent.</param>
    internal VfioMigrationV2(IVfioDeviceIo io, IVfioConfigState config, VfioMigrationFlags flags, bool precopyInfoV2, DeviceTransferCounter transfer)
    {
        (_io, _config, _transfer) = (io, config, transfer);
        _session = new VfioSessionSlot(io.Name);
        (Flags, HasPrecopyInfoV2) = (flags, precopyInfoV2);
    }

    public event Action<VfioDeviceState>? StateChanged;

    public int Version => 2;

    public VfioMigrationFlags Flags { get; }

    public VfioDeviceState State => _state;

    public bool CanUseThreads => true;

    internal IVfioDeviceIo Io => _io;

    /// <summary>How much state to expect of a device that does not say (QEMU: <c>VFIO_MIG_STOP_COPY_SIZE</c>).</summary>
    internal ulong AssumedStopCopyBytes { get; init; } = VfioMigrationOptions.UnknownStopCopyBytes;

    /// <summary>Feature 12 is set, so that the flag REINIT of the precopy figures has a meaning.</summary>
    internal bool HasPrecopyInfoV2 { get; }

    /// <summary>The data descriptor, when data can go from socket to socket; null without.</summary>
    internal IVfioDirectData? Direct => _data as IVfioDirectData;

    public IVfioSaveSession OpenSave(bool switchoverAck) => _session.OpenNew(() => new VfioSaveV2(this, switchoverAck, _transfer));

    public IVfioLoadSession OpenLoad() => _session.OpenNew(() => new VfioLoadV2(this));

    public void BeforePrecopyStops() => (_session.Open as VfioSaveV2)?.BeforePrecopyStops();

    public VfioDeviceState StopTarget(RunState state) =>
        VfioStateArcs.IsPrecopy(_state) && state is RunState.FinishMigrate or RunState.Paused ? VfioDeviceState.StopCopy : VfioDeviceState.Stop;

    public void SetState(VfioDeviceState target, VfioDeviceState recoverTo)
    {
        if (_state == target) return;
        if (_state == VfioDeviceState.Error) throw new VfioException($"device '{_io.Name}' is broken: it must be reset before it can go to {target.ToName()}", Errno.EIO);
        VfioDeviceState from = _state;
        Errno errno = Ask(target);
        if (errno == Errno.None) return;
        if (_io.LostReason is { } gone)
        {
            CloseData();
            Enter(VfioDeviceState.Error);
            throw new VfioException($"device '{_io.Name}' is gone, so it did not go from {from.ToName()} to {target.ToName()}", errno, gone);
        }
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

    public void ReadState()
    {
        if (_io.GetMigrationState(out VfioDeviceState state) == Errno.None && state != _state) Enter(state);
    }

    public void OnReset()
    {
        CloseData();
        Enter(VfioDeviceState.Running);
    }

    public void OnResetFailed()
    {
        bool isKnown = _io.GetMigrationState(out VfioDeviceState state) == Errno.None;
        CloseData();
        if (isKnown && VfioStateArcs.IsSaving(state)) isKnown = _io.SetMigrationState(state = VfioDeviceState.Stop, out _) == Errno.None;
        Enter(isKnown && state is VfioDeviceState.Running or VfioDeviceState.RunningP2P or VfioDeviceState.Stop ? state : VfioDeviceState.Error);
    }

    public void Dispose() => CloseData();

    /// <summary>
    /// One read of the device's state. While the device runs, 0 and ENOMSG both mean that there is nothing now; in STOP_COPY 0 is the end and ENOMSG
    /// an error.
    /// </summary>
    /// <returns>Bytes, at most as many as were asked for.</returns>
    internal int Read(Span<byte> into)
    {
        lock (_gate)
        {
            if (_data is null) throw new VfioException($"device '{_io.Name}' gave no data descriptor in {_state.ToName()}", Errno.EBADF);
            int n = _data.Read(into, out Errno errno);
            if (n < 0 && errno == Errno.ENOMSG && VfioStateArcs.IsPrecopy(_state)) return 0;
            if (n < 0) throw ReadFailed(errno);
            if (n > into.Length) throw new VfioException($"device '{_io.Name}' gave {n} bytes, {into.Length} were asked for", Errno.EPROTO);
            return n;
        }
    }

    /// <summary>Writes all bytes to a device in RESUMING.</summary>
    internal void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_gate)
        {
            while (bytes.Length > 0)
            {
                if (_data is null) throw new VfioException($"device '{_io.Name}' has no data descriptor to load into, it is in {_state.ToName()}", Errno.EBADF);
                int n = _data.Write(bytes, out Errno errno);
                if (n < 0) throw WriteFailed(errno);
                if (n == 0 || n > bytes.Length) throw new VfioException($"device '{_io.Name}' took {n} of {bytes.Length} bytes of its state", Errno.EIO);
                bytes = bytes[n..];
            }
        }
    }

    /// <summary>Asks for the precopy figures.</summary>
    /// <returns>The device's answer; null without a data descriptor.</returns>
    internal Errno? PrecopyInfo(out VfioPrecopyInfo info)
    {
        info = default;
        lock (_gate) return _data?.PrecopyInfo(out info);
    }

    internal VfioException ReadFailed(Errno errno) => new($"device '{_io.Name}' failed to give its state in {_state.ToName()} ({Name(errno)})", errno);

    internal VfioException WriteFailed(Errno errno) => new($"device '{_io.Name}' refused its state ({Name(errno)})", errno);

    /// <summary>Ends a session; the device has no data descriptor afterwards.</summary>
    internal void Close(object session)
    {
        CloseData();
        _session.Close(session);
    }

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
