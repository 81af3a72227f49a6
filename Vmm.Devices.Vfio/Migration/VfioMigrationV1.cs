using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Protocol v1: state bits and data in a region (vfio-migration 5; QEMU 5.2 to 7.2's <c>hw/vfio/migration.c</c>). Its states are named
/// with v2's words: 0 STOP, 1 RUNNING, 2 STOP_COPY, 3 PRE_COPY, 4 RESUMING. A lock of its own keeps run-state changes out of a data copy.
/// </summary>
internal sealed class VfioMigrationV1 : IVfioMigrationProtocol
{
    private const uint Running = VfioMigrationRegion.Running, Saving = VfioMigrationRegion.Saving, Resuming = VfioMigrationRegion.Resuming;

    /// <summary>Data are copied between region and stream in pieces of this size.</summary>
    private const int BufferBytes = 1 << 20;

    private readonly IVfioDeviceIo _io;
    private readonly IVfioConfigState _config;
    private readonly VfioMigrationRegion _region;
    private readonly DeviceTransferCounter _transfer;
    private readonly Lock _gate = new();
    private byte[]? _buffer;
    private ulong _pendingBytes;
    private volatile VfioDeviceState _state = VfioDeviceState.Running;

    internal VfioMigrationV1(IVfioDeviceIo io, IVfioConfigState config, VfioRegionInfo region, DeviceTransferCounter transfer)
    {
        _transfer = transfer;
        _io = io;
        _config = config;
        _region = new VfioMigrationRegion(io, region);
    }

    public event Action<VfioDeviceState>? StateChanged;

    public int Version => 1;

    public VfioMigrationFlags Flags => VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy;

    public VfioDeviceState State => _state;

    public bool IsActiveIterate => VfioStateArcs.IsSaving(_state);

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
        lock (_gate)
        {
            Errno errno = Write(mask, value, out bool isBroken);
            if (errno == Errno.None)
            {
                Enter(target);
                return;
            }
            string what = $"device '{_io.Name}' refused to go from {from.ToName()} to {target.ToName()} ({errno})";
            // v1 has no recovery arc: a refused write leaves the state as it was, and only a device that says that it is broken is reset.
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

    public void BeforePrecopyStops()
    {
    }

    public int TakeSwitchoverAckRequests() => 0;

    public void SaveSetup(bool switchoverAck)
    {
        _pendingBytes = 0;
        _buffer = GC.AllocateUninitializedArray<byte>(BufferBytes, pinned: true);
        _region.Map();
        SetState(_state == VfioDeviceState.Running ? VfioDeviceState.PreCopy : VfioDeviceState.StopCopy, _state);
    }

    public PendingBytes EstimatePending() => Pending();

    public PendingBytes ExactPending()
    {
        lock (_gate)
        {
            if (!IsActiveIterate || _region.ReadPendingBytes(out ulong pending) != Errno.None) pending = 0;
            _pendingBytes = pending;
        }
        return Pending();
    }

    public (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f)
    {
        lock (_gate)
        {
            if (_pendingBytes == 0) ReadPending();
            if (_pendingBytes == 0)
            {
                f.WriteUInt64(VfioStreamFlags.DevDataState);
                f.WriteUInt64(0);
                return (SaveProgress.Done, VfioStreamFlags.EndOfState);
            }
            SaveBuffer(f);
            // Whoever never asks for the pending bytes, as a snapshot, must not go by an old figure.
            _pendingBytes = 0;
            return (SaveProgress.More, VfioStreamFlags.EndOfState);
        }
    }

    public void SaveComplete(QemuFileWriter f)
    {
        SetState(VfioDeviceState.StopCopy, VfioDeviceState.Error);
        lock (_gate)
        {
            ReadPending();
            while (_pendingBytes > 0 && SaveBuffer(f) > 0) ReadPending();
        }
        SetState(VfioDeviceState.Stop, VfioDeviceState.Error);
    }

    public bool CanUseThreads => false;

    public void EnterStopCopy() => throw new InvalidOperationException("protocol v1 has no data channels");

    public int ReadStopCopy(Span<byte> into) => throw new InvalidOperationException("protocol v1 has no data channels");

    public void LoadBytes(ReadOnlySpan<byte> bytes) => throw new InvalidOperationException("protocol v1 has no data channels");

    public Exception? SaveCleanup()
    {
        lock (_gate)
        {
            _region.Unmap();
            (_buffer, _pendingBytes) = (null, 0);
        }
        return null;
    }

    public void LoadSetup()
    {
        _buffer ??= GC.AllocateUninitializedArray<byte>(BufferBytes, pinned: true);
        _region.Map();
        try
        {
            SetState(VfioDeviceState.Resuming, _state);
        }
        catch
        {
            _region.Unmap();
            throw;
        }
    }

    public void LoadData(QemuFileReader f, ulong lengthBytes)
    {
        byte[] buffer = _buffer ?? throw new VfioException($"device '{_io.Name}' got data outside a load", Errno.EINVAL);
        while (lengthBytes > 0)
        {
            // A chunk that is longer than the data section here goes in parts, each committed; shorter ones are not joined (vfio-migration 5.4).
            ulong offset = _region.ReadDataOffset();
            ulong room = Math.Min(lengthBytes, _region.SizeBytes - offset);
            if (room == 0) throw new VfioException($"device '{_io.Name}': data_offset 0x{offset:x} leaves no room in the region of 0x{_region.SizeBytes:x} bytes", Errno.ENOSPC);
            for (ulong done = 0; done < room;)
            {
                Span<byte> part = buffer.AsSpan(0, (int)Math.Min(room - done, BufferBytes));
                f.Read(part);
                _region.WriteData(offset + done, part);
                done += (ulong)part.Length;
            }
            _region.CommitDataSize(room);
            lengthBytes -= room;
        }
    }

    /// <summary>v1 has no arc from RESUMING but to RUNNING: the device says what it thinks of its data when the VM starts.</summary>
    public void LoadDone()
    {
    }

    public void LoadCleanup()
    {
        _region.Unmap();
        _buffer = null;
    }

    public void Dispose() => _region.Dispose();

    private PendingBytes Pending() => new((long)Math.Min(_pendingBytes, long.MaxValue / 4));

    private void ReadPending()
    {
        Errno errno = _region.ReadPendingBytes(out _pendingBytes);
        if (errno != Errno.None) throw new VfioException($"device '{_io.Name}': migration region: read pending_bytes failed ({errno})", errno);
    }

    /// <summary>One chunk as a data record; returns its size.</summary>
    private ulong SaveBuffer(QemuFileWriter f)
    {
        ulong offset = _region.ReadDataOffset();
        ulong size = _region.ReadDataSize(offset);
        f.WriteUInt64(VfioStreamFlags.DevDataState);
        f.WriteUInt64(size);
        for (ulong done = 0; done < size;)
        {
            Span<byte> part = _buffer.AsSpan(0, (int)Math.Min(size - done, BufferBytes));
            _region.ReadData(offset + done, part);
            f.Write(part);
            done += (ulong)part.Length;
        }
        _transfer.Add((long)size);
        return size;
    }

    /// <summary>Asks the device where it is; one that says nothing of use is taken to be where it was.</summary>
    internal void ReadState()
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
