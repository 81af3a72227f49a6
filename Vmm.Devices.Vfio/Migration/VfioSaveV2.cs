using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>One attempt to save a v2 device: sizes, precopy and stop-copy (vfio-migration 3.4).</summary>
/// <param name="protocol">The device.</param>
/// <param name="switchoverAck">The destination acknowledges first data.</param>
/// <param name="transfer">Counts data sent.</param>
internal sealed class VfioSaveV2(VfioMigrationV2 protocol, bool switchoverAck, DeviceTransferCounter transfer) : IVfioThreadedSave
{
    private byte[] _buffer = [];
    private bool _initDataSent;
    private bool _dataWasSent;
    private int _ackRequests;
    private bool _isPrecopyInfoMissing;
    private bool _hasPrecopyPaused;
    private ulong _initialBytes;
    private ulong _dirtyBytes;
    private ulong _stopCopyBytes;

    public bool IsActiveIterate => VfioStateArcs.IsPrecopy(protocol.State);

    public bool IsSizeUnknown { get; private set; }

    private IVfioDeviceIo Io => protocol.Io;

    public void SaveSetup()
    {
        _stopCopyBytes = QueryStopCopyBytes();
        // A size of 0 says nothing. A device with little state gets a small buffer.
        ulong wanted = _stopCopyBytes == 0 ? VfioMigrationV2.MaxBufferBytes : _stopCopyBytes;
        _buffer = GC.AllocateUninitializedArray<byte>((int)Math.Clamp(wanted, VfioMigrationV2.MinBufferBytes, VfioMigrationV2.MaxBufferBytes), pinned: true);
        if ((protocol.Flags & VfioMigrationFlags.PreCopy) == 0 || protocol.State == VfioDeviceState.Stop) return;
        if (protocol.State != VfioDeviceState.Running)
            throw new VfioException($"device '{Io.Name}' is in {protocol.State.ToName()}; a migration begins in RUNNING or STOP", Errno.EINVAL);
        protocol.SetState(VfioDeviceState.PreCopy, VfioDeviceState.Running);
        QueryPrecopy();
        if (switchoverAck) Interlocked.Increment(ref _ackRequests);
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

    /// <summary>The VM is about to stop. BQL: held.</summary>
    internal void BeforePrecopyStops()
    {
        if (!protocol.HasPrecopyInfoV2 || !switchoverAck || !IsActiveIterate) return;
        // First data that appear now are too late for an acknowledgement; a device that does not answer may have some (vfio-migration 3.6).
        if (!QueryPrecopy()) Interlocked.Increment(ref _ackRequests);
    }

    public (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f)
    {
        int n = protocol.Read(_buffer);
        if (n > 0) Record(f, n);
        else (_initialBytes, _dirtyBytes, _hasPrecopyPaused) = (0, 0, true);
        // vfio-user has no query for what is left. Assume that as much comes again, and call it first data until a read has given none.
        if (n > 0 && _isPrecopyInfoMissing) (_initialBytes, _dirtyBytes) = _hasPrecopyPaused ? (0UL, (ulong)n) : ((ulong)n, 0UL);
        SaveProgress progress = _initialBytes == 0 && _dirtyBytes == 0 ? SaveProgress.Done : SaveProgress.More;
        if (!switchoverAck || _initDataSent || _initialBytes != 0) return (progress, VfioStreamFlags.EndOfState);
        _initDataSent = true;
        return (progress, VfioStreamFlags.DevInitDataSent);
    }

    public void SaveComplete(QemuFileWriter f)
    {
        EnterStopCopy();
        if (protocol.Direct is { CanMove: true } direct && f.Channel.Descriptor is { } socket) SaveDirect(f, direct, socket);
        else while (protocol.Read(_buffer) is var n && n > 0) Record(f, n);
    }

    public int ReadStopCopy(Span<byte> into)
    {
        int n = protocol.Read(into);
        transfer.Add(n);
        return n;
    }

    public void EnterStopCopy()
    {
        if (_dataWasSent && !VfioStateArcs.IsSaving(protocol.State))
            throw new VfioException($"device '{Io.Name}' was started again after part of its state had been sent; that part is void", Errno.ECANCELED);
        protocol.SetState(VfioDeviceState.StopCopy, VfioDeviceState.Stop);
    }

    public VfioException? SaveCleanup()
    {
        VfioException? failure = VfioMigration.LeaveSaving(protocol);
        protocol.Close(this);
        return failure;
    }

    private void Record(QemuFileWriter f, int n)
    {
        f.WriteUInt64(VfioStreamFlags.DevDataState);
        f.WriteUInt64((ulong)n);
        f.Write(_buffer.AsSpan(0, n));
        _dataWasSent = true;
        transfer.Add(n);
        ulong left = (ulong)n;
        ulong initial = Math.Min(left, _initialBytes);
        _initialBytes -= initial;
        _dirtyBytes -= Math.Min(left - initial, _dirtyBytes);
        _stopCopyBytes -= Math.Min(left, _stopCopyBytes);
    }

    /// <summary>Writes the same records; the data go from the device's socket to the channel's without a copy in this process.</summary>
    private void SaveDirect(QemuFileWriter f, IVfioDirectData direct, OwnedFd socket)
    {
        Errno errno = direct.MoveOut(socket, f.Channel.Name, n =>
        {
            f.WriteUInt64(VfioStreamFlags.DevDataState);
            f.WriteUInt64((ulong)n);
            f.Flush();
            f.NoteMoved(n);
            transfer.Add(n);
        });
        if (errno != Errno.None) throw protocol.ReadFailed(errno);
    }

    private ulong QueryStopCopyBytes()
    {
        Span<byte> size = stackalloc byte[8];
        size.Clear();
        IsSizeUnknown = Io.DeviceFeature(VfioDeviceFeature.MigDataSize, VfioFeatureOp.Get, size) != Errno.None;
        return IsSizeUnknown ? protocol.AssumedStopCopyBytes : BinaryPrimitives.ReadUInt64LittleEndian(size);
    }

    /// <summary>Reads the precopy figures; a failure counts as nothing left (vfio-migration 3.4).</summary>
    private bool QueryPrecopy()
    {
        if (protocol.PrecopyInfo(out VfioPrecopyInfo info) is not { } errno) return false;
        if (errno == Errno.ENOTTY)
        {
            if (!_isPrecopyInfoMissing) _initialBytes = (ulong)_buffer.Length;
            _isPrecopyInfoMissing = true;
            return true;
        }
        if (errno != Errno.None) info = default;
        (_initialBytes, _dirtyBytes) = (info.InitialBytes, info.DirtyBytes);
        if (errno == Errno.None && protocol.HasPrecopyInfoV2 && info.IsReinit && _initDataSent)
        {
            _initDataSent = false;
            if (switchoverAck) Interlocked.Increment(ref _ackRequests);
        }
        return errno == Errno.None;
    }

    private static ulong Saturated(ulong a, ulong b) => a > ulong.MaxValue - b ? ulong.MaxValue : a + b;

    private static long Clamp(ulong bytes) => (long)Math.Min(bytes, long.MaxValue / 4);
}
