using System.Numerics;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Migration states, reset and the device's DMA log (vfio-user 4, 8).</summary>
internal sealed partial class VfioUserDeviceIo
{
    private VfioDeviceState? _state = VfioDeviceState.Running;
    private VfioUserMigrationData? _session;
    private ulong _logPageBytes;

    /// <inheritdoc/>
    public Errno GetMigrationState(out VfioDeviceState state)
    {
        Span<byte> data = stackalloc byte[VfioUserStateData.Length];
        Errno errno = Features.Call(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Get, data, Client.TimeoutMs);
        VfioUserStateData.TryRead(data, out VfioUserStateData read);
        state = errno == Errno.None ? read.State : VfioDeviceState.Error;
        if (errno == Errno.None) Entered(state);
        return errno;
    }

    /// <inheritdoc/>
    public Errno SetMigrationState(VfioDeviceState state, out IVfioMigrationData? data)
    {
        data = null;
        if (_state is null) GetMigrationState(out _);
        VfioDeviceState? before = _state;
        Errno errno = SetState(state);
        if (errno != Errno.None)
        {
            // After a failure the device may be in any state on the path.
            _state = null;
            GetMigrationState(out _);
            return errno;
        }
        // The kernel's rule for its data descriptors (vfio-migration 2): a session begins where saving or resuming is entered from outside.
        bool begins = (IsSaving(state) && !(before is { } b && IsSaving(b))) || (state == VfioDeviceState.Resuming && before != state);
        if (begins) EndSession();
        Entered(state);
        if (begins) data = _session = new VfioUserMigrationData(Client, state == VfioDeviceState.Resuming, _options);
        if (_session is not null) _session.IsPreCopy = state is VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P;
        return Errno.None;
    }

    /// <inheritdoc/>
    public Errno Reset()
    {
        Errno errno = SendReset();
        // libvfio-user refuses a reset in STOP and STOP_COPY, and a reset leaves its migration state alone (vfio-user 8).
        if (errno == Errno.EINVAL && _state != VfioDeviceState.Running && SetState(VfioDeviceState.Running) == Errno.None) errno = SendReset();
        if (errno != Errno.None) return errno;
        EndSession();
        bool mayBeElsewhere = _state != VfioDeviceState.Running;
        _state = VfioDeviceState.Running;
        if (mayBeElsewhere && GetMigrationState(out VfioDeviceState state) == Errno.None && state != VfioDeviceState.Running) errno = SetMigrationState(VfioDeviceState.Running, out _);
        return errno;
    }

    /// <inheritdoc/>
    public Errno StartDmaLog(ulong pageSizeBytes, IReadOnlyList<GuestRange> ranges, out ulong inForceBytes)
    {
        ArgumentNullException.ThrowIfNull(ranges);
        inForceBytes = 0;
        byte[] data = new byte[VfioUserLogStart.Length + (VfioUserLogStart.RangeBytes * ranges.Count)];
        new VfioUserLogStart(pageSizeBytes, (uint)ranges.Count).Write(data);
        for (int i = 0; i < ranges.Count; i++)
            new VfioUserDmaAccess(ranges[i].Start.Value, ranges[i].LengthBytes).Write(data.AsSpan(VfioUserLogStart.Length + (VfioUserLogStart.RangeBytes * i)));
        Errno errno = Features.Call(VfioDeviceFeature.DmaLoggingStart, VfioFeatureOp.Set, data, Client.TimeoutMs);
        if (errno != Errno.None) return errno;
        VfioUserLogStart.TryRead(data, out VfioUserLogStart reply);
        if (reply.PageSize < VfioUserLimits.PageBytes || !BitOperations.IsPow2(reply.PageSize)) return Errno.EPROTO;
        inForceBytes = _logPageBytes = reply.PageSize;
        return Errno.None;
    }

    /// <inheritdoc/>
    public Errno StopDmaLog()
    {
        _logPageBytes = 0;
        return Features.Call(VfioDeviceFeature.DmaLoggingStop, VfioFeatureOp.Set, default, Client.TimeoutMs);
    }

    /// <inheritdoc/>
    public Errno ReportDmaLog(GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap)
    {
        // With another page size than at the start, libvfio-user reports wrong pages or hangs (vfio-user C-15, 4).
        if (pageSizeBytes == 0 || pageSizeBytes != _logPageBytes) return Errno.EINVAL;
        if ((ulong)bitmap.Length * 8 < VfioUserBitmap.BytesFor(range.LengthBytes, pageSizeBytes)) return Errno.EINVAL;
        foreach (VfioUserMapping map in _container.Mappings)
        {
            if (!map.IsWritableByFd || !map.Intersect(range, out GuestRange part)) continue;
            Errno errno = Report(part, range, pageSizeBytes, bitmap);
            if (errno != Errno.None) return errno;
        }
        return Errno.None;
    }

    private Errno Report(GuestRange part, GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap)
    {
        const int head = VfioUserFeature.Length + VfioUserLogReport.Length;
        ulong offset = part.Start.Value - range.Start.Value;
        if (offset % pageSizeBytes != 0) return Errno.EINVAL;
        ulong bytes = VfioUserBitmap.BytesFor(part.LengthBytes, pageSizeBytes);
        if (bytes + head > VfioUserLimits.DataXferBytes) return Errno.E2BIG;
        using VfioUserExchange x = Client.Begin();
        Span<byte> body = x.Body(head);
        new VfioUserFeature((uint)(head + bytes), VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get).Write(body);
        new VfioUserLogReport(part.Start.Value, part.LengthBytes, pageSizeBytes).Write(body[VfioUserFeature.Length..]);
        Errno errno = x.Run(VfioUserCommand.DeviceFeature, head + (int)bytes);
        if (errno != Errno.None) return errno;
        if (x.Reply.Length < head + (int)bytes) return Errno.EPROTO;
        VfioUserBitmap.OrInto(x.Reply[head..], (part.LengthBytes + pageSizeBytes - 1) / pageSizeBytes, bitmap, offset / pageSizeBytes);
        return Errno.None;
    }

    private Errno SetState(VfioDeviceState state)
    {
        // A server may write or check all its state where data begin and where their load ends. Elsewhere who waits is often an operator.
        bool isLong = VfioStateArcs.HasData(state) || _state is null or VfioDeviceState.Resuming;
        Span<byte> data = stackalloc byte[VfioUserStateData.Length];
        new VfioUserStateData(state, VfioUserStateData.NoFd).Write(data);
        return Features.Call(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, data, isLong ? _options.MigrationTimeoutMs : Client.TimeoutMs);
    }

    private Errno SendReset()
    {
        using VfioUserExchange x = Client.Begin();
        return x.Run(VfioUserCommand.DeviceReset);
    }

    private void Entered(VfioDeviceState state)
    {
        _state = state;
        if (_session is { } session && (session.IsResuming ? state != VfioDeviceState.Resuming : !IsSaving(state))) EndSession();
    }

    private void EndSession()
    {
        _session?.Dispose();
        _session = null;
    }

    private static bool IsSaving(VfioDeviceState state) => state is VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P or VfioDeviceState.StopCopy;
}
