using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>The data of a session: sizes, precopy, stop-copy and resuming (vfio-migration 3.4, 3.5).</summary>
internal sealed partial class VfioMigrationV2
{
    private const int DirectReadAheadBytes = 4096;

    private bool _switchoverAck;
    private bool _initDataSent;
    private bool _dataWasSent;
    private int _ackRequests;
    private bool _isPrecopyInfoMissing;
    private bool _hasPrecopyPaused;
    private ulong _initialBytes;
    private ulong _dirtyBytes;
    private ulong _stopCopyBytes;

    public bool IsActiveIterate => VfioStateArcs.IsPrecopy(_state);

    public void SaveSetup(bool switchoverAck)
    {
        (_switchoverAck, _initDataSent, _dataWasSent, _ackRequests) = (switchoverAck, false, false, 0);
        (_initialBytes, _dirtyBytes, _isPrecopyInfoMissing, _hasPrecopyPaused) = (0, 0, false, false);
        _stopCopyBytes = QueryStopCopyBytes();
        // A size of 0 says nothing over vfio-user, where there is no such query; small sizes are worth a small buffer.
        ulong wanted = _stopCopyBytes == 0 ? MaxBufferBytes : _stopCopyBytes;
        _buffer = GC.AllocateUninitializedArray<byte>((int)Math.Clamp(wanted, MinBufferBytes, MaxBufferBytes), pinned: true);
        if (!HasPrecopy || _state == VfioDeviceState.Stop) return;
        if (_state != VfioDeviceState.Running)
            throw new VfioException($"device '{_io.Name}' is in {_state.ToName()}; a migration begins in RUNNING or STOP", Errno.EINVAL);
        SetState(VfioDeviceState.PreCopy, VfioDeviceState.Running);
        QueryPrecopy();
        if (_switchoverAck) Interlocked.Increment(ref _ackRequests);
    }

    public int TakeSwitchoverAckRequests() => Interlocked.Exchange(ref _ackRequests, 0);

    public PendingBytes EstimatePending()
    {
        ulong precopy = IsActiveIterate ? Saturated(_initialBytes, _dirtyBytes) : 0;
        return new PendingBytes(Clamp(precopy), Clamp(_stopCopyBytes > precopy ? _stopCopyBytes - precopy : 0));
    }

    public PendingBytes ExactPending()
    {
        _stopCopyBytes = QueryStopCopyBytes();
        if (IsActiveIterate) QueryPrecopy();
        return EstimatePending();
    }

    public void BeforePrecopyStops()
    {
        if (!_precopyInfoV2 || !_switchoverAck || !IsActiveIterate) return;
        // A first part that appears now can no longer be acknowledged; not knowing counts as one (vfio-migration 3.6).
        if (!QueryPrecopy()) Interlocked.Increment(ref _ackRequests);
    }

    public (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f)
    {
        int n = Read();
        if (n > 0) Record(f, n);
        else (_initialBytes, _dirtyBytes, _hasPrecopyPaused) = (0, 0, true);
        // A device that cannot say what is left (vfio-user) has about as much again, the first part up to its first pause.
        if (n > 0 && _isPrecopyInfoMissing) (_initialBytes, _dirtyBytes) = _hasPrecopyPaused ? (0UL, (ulong)n) : ((ulong)n, 0UL);
        SaveProgress progress = _initialBytes == 0 && _dirtyBytes == 0 ? SaveProgress.Done : SaveProgress.More;
        if (!_switchoverAck || _initDataSent || _initialBytes != 0) return (progress, VfioStreamFlags.EndOfState);
        _initDataSent = true;
        return (progress, VfioStreamFlags.DevInitDataSent);
    }

    public bool CanUseThreads => true;

    public void SaveComplete(QemuFileWriter f)
    {
        EnterStopCopy();
        if (_data is IVfioDirectData { CanMove: true } direct && f.Channel is IDescriptorChannel channel) SaveDirect(f, direct, channel);
        else while (Read() is var n && n > 0) Record(f, n);
    }

    public int ReadStopCopy(Span<byte> into)
    {
        int n = Read(into);
        _transfer.Add(n);
        return n;
    }

    public void EnterStopCopy()
    {
        if (_dataWasSent && !VfioStateArcs.IsSaving(_state))
            throw new VfioException($"device '{_io.Name}' was started again after part of its state had been sent; that part is void", Errno.ECANCELED);
        SetState(VfioDeviceState.StopCopy, VfioDeviceState.Stop);
    }

    public Exception? SaveCleanup()
    {
        Exception? failure = null;
        try
        {
            if (_state == VfioDeviceState.StopCopy) SetState(VfioDeviceState.Stop, VfioDeviceState.Error);
        }
        catch (VfioException e)
        {
            failure = e;
        }
        CloseData();
        (_buffer, _initialBytes, _dirtyBytes, _stopCopyBytes, _switchoverAck, _dataWasSent) = (null, 0, 0, 0, false, false);
        return failure;
    }

    public void LoadSetup()
    {
        SetState(VfioDeviceState.Resuming, _state);
        _buffer ??= GC.AllocateUninitializedArray<byte>(MaxBufferBytes, pinned: true);
    }

    public void LoadData(QemuFileReader f, ulong lengthBytes)
    {
        byte[] buffer = _buffer ?? throw new VfioException($"device '{_io.Name}' got data outside a load", Errno.EINVAL);
        if (_data is IVfioDirectData { CanMove: true } direct && f.Channel is IDescriptorChannel channel)
        {
            LoadDirect(f, lengthBytes, direct, channel);
            return;
        }
        while (lengthBytes > 0)
        {
            Span<byte> part = buffer.AsSpan(0, (int)Math.Min(lengthBytes, (ulong)buffer.Length));
            f.Read(part);
            LoadBytes(part);
            lengthBytes -= (ulong)part.Length;
        }
    }

    public void LoadDone()
    {
        if (_data is IVfioDirectData direct && direct.FinishMoves() is var errno and not Errno.None) throw Refused(errno);
        // Asked for now and not when the VM starts, so that a device that does not like its data fails the load while the source can go on.
        if (_state == VfioDeviceState.Resuming) SetState(VfioDeviceState.Stop, VfioDeviceState.Error);
    }

    public void LoadCleanup()
    {
        CloseData();
        _buffer = null;
    }

    private void Record(QemuFileWriter f, int n)
    {
        f.WriteUInt64(VfioStreamFlags.DevDataState);
        f.WriteUInt64((ulong)n);
        f.Write(_buffer.AsSpan(0, n));
        _dataWasSent = true;
        _transfer.Add(n);
        ulong left = (ulong)n;
        ulong initial = Math.Min(left, _initialBytes);
        _initialBytes -= initial;
        _dirtyBytes -= Math.Min(left - initial, _dirtyBytes);
        _stopCopyBytes -= Math.Min(left, _stopCopyBytes);
    }

    /// <summary>One read. While the device runs, 0 and ENOMSG both mean that there is nothing now; stopped, 0 is the end and ENOMSG a fault.</summary>
    private int Read() => Read(_buffer);

    private int Read(Span<byte> into)
    {
        lock (_gate)
        {
            if (_data is null) throw new VfioException($"device '{_io.Name}' gave no data descriptor in {_state.ToName()}", Errno.EBADF);
            int n = _data.Read(into, out Errno errno);
            if (n < 0 && errno == Errno.ENOMSG && IsActiveIterate) return 0;
            if (n < 0) throw new VfioException($"device '{_io.Name}' failed to give its state in {_state.ToName()} ({Name(errno)})", errno);
            if (n > into.Length) throw new VfioException($"device '{_io.Name}' gave {n} bytes, {into.Length} were asked for", Errno.EPROTO);
            return n;
        }
    }

    public void LoadBytes(ReadOnlySpan<byte> source)
    {
        lock (_gate)
        {
            while (source.Length > 0)
            {
                if (_data is null) throw new VfioException($"device '{_io.Name}' has no data descriptor to load into, it is in {_state.ToName()}", Errno.EBADF);
                int n = _data.Write(source, out Errno errno);
                if (n < 0) throw Refused(errno);
                if (n == 0 || n > source.Length) throw new VfioException($"device '{_io.Name}' took {n} of {source.Length} bytes of its state", Errno.EIO);
                source = source[n..];
            }
        }
    }

    /// <summary>As records, but the data go from the device's socket to the channel's without a copy here.</summary>
    private void SaveDirect(QemuFileWriter f, IVfioDirectData direct, IDescriptorChannel channel)
    {
        Errno errno = direct.MoveOut(channel.Descriptor, channel.Name, n =>
        {
            f.WriteUInt64(VfioStreamFlags.DevDataState);
            f.WriteUInt64((ulong)n);
            f.Flush();
            f.NoteMoved(n);
            _transfer.Add(n);
        });
        if (errno != Errno.None) throw new VfioException($"device '{_io.Name}' failed to give its state in {_state.ToName()} ({Name(errno)})", errno);
    }

    private void LoadDirect(QemuFileReader f, ulong lengthBytes, IVfioDirectData direct, IDescriptorChannel channel)
    {
        // Just enough to see the next record: what the reader takes ahead has to be copied.
        f.ReadAheadBytes = DirectReadAheadBytes;
        while (lengthBytes > 0)
        {
            int n = (int)Math.Min(lengthBytes, (ulong)direct.PieceBytes);
            ReadOnlySpan<byte> buffered = f.TakeBuffered(n);
            Errno errno = direct.MoveIn(buffered, channel.Descriptor, channel.Name, n);
            f.NoteMoved(n - buffered.Length);
            if (errno != Errno.None) throw Refused(errno);
            lengthBytes -= (ulong)n;
        }
    }

    private VfioException Refused(Errno errno) => new($"device '{_io.Name}' refused its state ({Name(errno)})", errno);

    private ulong QueryStopCopyBytes()
    {
        Span<byte> size = stackalloc byte[8];
        size.Clear();
        return _io.DeviceFeature(VfioDeviceFeature.MigDataSize, VfioFeatureOp.Get, size) == Errno.None
            ? BinaryPrimitives.ReadUInt64LittleEndian(size)
            : _io.AssumedStopCopyBytes;
    }

    /// <summary>Reads the precopy figures; a failure counts as nothing left (vfio-migration 3.4).</summary>
    private bool QueryPrecopy()
    {
        VfioPrecopyInfo info;
        Errno errno;
        lock (_gate)
        {
            if (_data is null) return false;
            errno = _data.PrecopyInfo(out info);
        }
        if (errno == Errno.ENOTTY)
        {
            if (!_isPrecopyInfoMissing) _initialBytes = (ulong)_buffer!.Length;
            _isPrecopyInfoMissing = true;
            return true;
        }
        if (errno != Errno.None) info = default;
        (_initialBytes, _dirtyBytes) = (info.InitialBytes, info.DirtyBytes);
        if (errno == Errno.None && _precopyInfoV2 && info.IsReinit && _initDataSent)
        {
            _initDataSent = false;
            if (_switchoverAck) Interlocked.Increment(ref _ackRequests);
        }
        return errno == Errno.None;
    }

    private static ulong Saturated(ulong a, ulong b) => a > ulong.MaxValue - b ? ulong.MaxValue : a + b;

    private static long Clamp(ulong bytes) => (long)Math.Min(bytes, long.MaxValue / 4);
}
