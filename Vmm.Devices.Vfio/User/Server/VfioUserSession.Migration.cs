using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

internal sealed partial class VfioUserSession
{
    /// <summary>DEVICE_RESET (vfio-user 3.11) works in every state and cancels a session that is open (vfio-user S-35).</summary>
    private Errno Reset()
    {
        if (!Quiesce()) return Errno.EIO;
        try
        {
            _legacy?.Restart();
            return AwaitStep(() => _device.Fsm.Reset(VfioUserResetReason.Device));
        }
        finally
        {
            _backend.Unquiesce();
        }
    }

    /// <summary>DEVICE_FEATURE (vfio-user 4): checks feature and operation, then runs it. The reply to SET and PROBE repeats the request.</summary>
    private Errno Feature(ReadOnlySpan<byte> body)
    {
        if (!_device.Fsm.IsMigratable || !VfioUserFeature.TryRead(body, out VfioUserFeature request)) return Errno.EINVAL;
        VfioFeatureOp known = request.Feature switch
        {
            VfioDeviceFeature.Migration or VfioDeviceFeature.DmaLoggingReport => VfioFeatureOp.Get,
            VfioDeviceFeature.MigDataSize when _backend.EstimateStateBytes() is not null => VfioFeatureOp.Get,
            VfioDeviceFeature.MigDeviceState => VfioFeatureOp.Get | VfioFeatureOp.Set,
            VfioDeviceFeature.DmaLoggingStart or VfioDeviceFeature.DmaLoggingStop => VfioFeatureOp.Set,
            _ => 0,
        };
        const VfioFeatureOp all = VfioFeatureOp.Get | VfioFeatureOp.Set | VfioFeatureOp.Probe;
        VfioFeatureOp op = request.Op & ~VfioFeatureOp.Probe;
        if (known == 0 || request.Op == 0 || (request.Op & ~all) != 0 || (op & ~known) != 0) return Errno.EINVAL;
        if ((request.Op & VfioFeatureOp.Probe) != 0) return request.ArgSz < body.Length ? Errno.EINVAL : Echo(body);
        if (op == VfioFeatureOp.Set && request.ArgSz < body.Length) return Errno.EINVAL;
        ReadOnlySpan<byte> data = body[VfioUserFeature.Length..];
        return (request.Feature, op) switch
        {
            (VfioDeviceFeature.Migration, _) => GetNumber(request, (ulong)_backend.MigrationFlags),
            (VfioDeviceFeature.MigDataSize, _) => GetNumber(request, _backend.EstimateStateBytes() ?? 0),
            (VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Get) => GetState(request),
            (VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set) => SetState(data, body),
            (VfioDeviceFeature.DmaLoggingStart, _) => StartLog(data, body),
            (VfioDeviceFeature.DmaLoggingStop, _) => StopLog(body),
            (VfioDeviceFeature.DmaLoggingReport, _) => ReportLog(request, data),
            // GET and SET together make sense only with PROBE.
            _ => Errno.EINVAL,
        };
    }

    private Errno GetNumber(in VfioUserFeature request, ulong value)
    {
        const int length = VfioUserFeature.Length + 8;
        if (request.ArgSz < length) return Errno.EINVAL;
        Span<byte> payload = Payload(length);
        (request with { ArgSz = length }).Write(payload);
        LittleEndian.U64(payload, VfioUserFeature.Length, value);
        return Errno.None;
    }

    private Errno GetState(in VfioUserFeature request)
    {
        const int length = VfioUserFeature.Length + VfioUserStateData.Length;
        if (request.ArgSz < length) return Errno.EINVAL;
        Span<byte> payload = Payload(length);
        (request with { ArgSz = length }).Write(payload);
        new VfioUserStateData(_device.Fsm.State, VfioUserStateData.NoFd).Write(payload[VfioUserFeature.Length..]);
        return Errno.None;
    }

    private Errno SetState(ReadOnlySpan<byte> data, ReadOnlySpan<byte> body)
    {
        if (!VfioUserStateData.TryRead(data, out VfioUserStateData request)) return Errno.EINVAL;
        Errno errno = SetState(request.State);
        return errno == Errno.None ? Echo(body) : errno;
    }

    /// <summary>Walks to a state, arc by arc; the answer to a failed arc is its errno, and the last completed state stays (vfio-user S-54).</summary>
    private Errno SetState(VfioDeviceState target)
    {
        if (!IsFsmFree()) return Errno.EIO;
        VfioDeviceState from = _device.Fsm.State;
        IReadOnlyList<VfioDeviceState>? path = _device.Fsm.Path(target);
        if (path is null) return Errno.EINVAL;
        if (path.Count == 0) return Errno.None;
        if (!Quiesce()) return Errno.EIO;
        Errno errno = Errno.None;
        try
        {
            for (int i = 0; i < path.Count && errno == Errno.None; i++) errno = AwaitStep(() => _device.Fsm.Step(path[i]));
        }
        finally
        {
            _backend.Unquiesce();
            VfioUserLog.StateChanged(_logger, _socket.Name, from, _device.Fsm.State, errno);
        }
        return errno;
    }

    private Errno StartLog(ReadOnlySpan<byte> data, ReadOnlySpan<byte> body)
    {
        // The ranges are ignored, because all mapped memory is logged.
        if (!VfioUserLogStart.TryRead(data, out VfioUserLogStart request) || (ulong)(data.Length - VfioUserLogStart.Length) < (ulong)request.NumRanges * VfioUserLogStart.RangeBytes)
            return Errno.EINVAL;
        Errno errno = _device.Dma.StartLog(request.PageSize);
        return errno == Errno.None ? Echo(body) : errno;
    }

    private Errno StopLog(ReadOnlySpan<byte> body)
    {
        _device.Dma.StopLog();
        return Echo(body);
    }

    private Errno ReportLog(in VfioUserFeature request, ReadOnlySpan<byte> data)
    {
        if (!VfioUserLogReport.TryRead(data, out VfioUserLogReport report) || !ulong.IsPow2(report.PageSize) || report.Size == 0) return Errno.EINVAL;
        const int head = VfioUserFeature.Length + VfioUserLogReport.Length;
        ulong bytes = VfioUserBitmap.BytesFor(report.Size, report.PageSize);
        // Checked before anything is allocated by it (vfio-user S-26).
        if (bytes > (ulong)_device.Options.MaxDataXferBytes || request.ArgSz < head + bytes) return Errno.EINVAL;
        Span<byte> payload = Payload(head + (int)bytes);
        (request with { ArgSz = head + (uint)bytes }).Write(payload);
        data[..VfioUserLogReport.Length].CopyTo(payload[VfioUserFeature.Length..]);
        return _device.Dma.Report(report.Iova, report.Size, report.PageSize, payload[head..]);
    }

    /// <summary>
    /// MIG_DATA_READ (vfio-user 8.1). Every reply but the last is full, because some clients take a shorter one for the end; the last is padded to the
    /// size asked for, because others expect that (vfio-user S-36).
    /// </summary>
    private Errno MigDataRead(ReadOnlySpan<byte> body)
    {
        Errno errno = CheckMigData(body, out int size);
        if (errno != Errno.None) return errno;
        if (_device.Fsm.TryTake(size, out ReadOnlyMemory<byte> whole))
        {
            _replyData = whole;
            Stats.CountSaved(size);
            new VfioUserMigData((uint)(VfioUserMigData.Length + size), (uint)size).Write(Payload(VfioUserMigData.Length));
            return Errno.None;
        }
        Span<byte> payload = Payload(VfioUserMigData.Length + size);
        Span<byte> data = payload[VfioUserMigData.Length..];
        int n = _device.Fsm.Read(data, out errno);
        if (n < 0) return errno;
        data[n..].Clear();
        Stats.CountSaved(n);
        new VfioUserMigData((uint)(VfioUserMigData.Length + n), (uint)n).Write(payload);
        return Errno.None;
    }

    /// <summary>MIG_DATA_WRITE (vfio-user 8.1); pieces of any size (vfio-user S-40). The reply is a bare header.</summary>
    private Errno MigDataWrite(ReadOnlySpan<byte> body)
    {
        Errno errno = CheckMigData(body, out int size);
        if (errno != Errno.None) return errno;
        if (body.Length < VfioUserMigData.Length + size) return Errno.EINVAL;
        errno = _device.Fsm.Write(body.Slice(VfioUserMigData.Length, size));
        if (errno == Errno.None) Stats.CountLoaded(size);
        return errno;
    }

    private Errno CheckMigData(ReadOnlySpan<byte> body, out int size)
    {
        size = 0;
        // The client's limit holds in both directions (vfio-user 8.1); the server's bounds the reply's buffer.
        if (!VfioUserMigData.TryRead(body, out VfioUserMigData request) || request.Size > (uint)Math.Min(_client.MaxDataXferBytes, _device.Options.MaxDataXferBytes)
            || request.ArgSz < VfioUserMigData.Length + request.Size) return Errno.EINVAL;
        size = (int)request.Size;
        return IsFsmFree() ? Errno.None : Errno.EIO;
    }
}
