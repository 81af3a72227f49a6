using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>Interrupts, DEVICE_FEATURE, migration states and the device's own dirty log.</summary>
internal sealed partial class KernelVfioDeviceIo
{
    private const int FeatureHeaderBytes = 8, IrqSetBytes = 20;

    /// <summary>True after the device was told to fill the flags of its precopy info.</summary>
    private volatile bool _precopyInfoHasFlags;

    /// <inheritdoc/>
    /// <remarks>ENOSPC when the host has fewer MSI or MSI-X vectors than asked for; the kernel then returns their number, which is logged.</remarks>
    public Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> eventFds)
    {
        // The kernel still has the eventfds bound: they were handed over with the device.
        if (IsUntouchable) return Errno.None;
        int dataBytes = request.Flags.HasFlag(VfioIrqSetFlags.DataBool) ? bools.Length : request.Flags.HasFlag(VfioIrqSetFlags.DataEventFd) ? eventFds.Length * sizeof(int) : 0;
        byte[] bytes = new byte[IrqSetBytes + dataBytes];
        var header = new VfioUapi.IrqSet { Argsz = (uint)bytes.Length, Flags = (uint)request.Flags, Index = request.Index, Start = request.Start, Count = request.Count };
        Ioctl.AsBytes(ref header).CopyTo(bytes);
        Span<byte> data = bytes.AsSpan(IrqSetBytes);
        if (request.Flags.HasFlag(VfioIrqSetFlags.DataBool)) bools.CopyTo(data);
        int held = 0;
        try
        {
            if (request.Flags.HasFlag(VfioIrqSetFlags.DataEventFd))
            {
                for (; held < eventFds.Length; held++)
                {
                    bool added = false;
                    eventFds[held]?.DangerousAddRef(ref added);
                    BinaryPrimitives.WriteInt32LittleEndian(data[(held * sizeof(int))..], eventFds[held]?.Number ?? -1);
                }
            }
            int result = _kernel.Ioctl(_fd, VfioUapi.VFIO_DEVICE_SET_IRQS, bytes, out Errno errno);
            if (result <= 0) return errno;
            VfioKernelLog.TooFewVectors(_logger, Name, request.Index, request.Count, result);
            return Errno.ENOSPC;
        }
        finally
        {
            while (--held >= 0) eventFds[held]?.DangerousRelease();
        }
    }

    /// <inheritdoc/>
    public bool TakesUnmaskEventFd => true;

    /// <inheritdoc/>
    public Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data)
    {
        byte[] bytes = new byte[FeatureHeaderBytes + data.Length];
        VfioUapi.DeviceFeature header = FeatureHeader(feature, op, data.Length);
        Ioctl.AsBytes(ref header).CopyTo(bytes);
        data.CopyTo(bytes.AsSpan(FeatureHeaderBytes));
        _kernel.Ioctl(_fd, VfioUapi.VFIO_DEVICE_FEATURE, bytes, out Errno errno);
        if (errno != Errno.None) return errno;
        bytes.AsSpan(FeatureHeaderBytes).CopyTo(data);
        if (feature == VfioDeviceFeature.MigPrecopyInfoV2 && op == VfioFeatureOp.Set) _precopyInfoHasFlags = true;
        return Errno.None;
    }

    public Errno GetMigrationState(out VfioDeviceState state)
    {
        Errno errno = MigState(VfioFeatureOp.Get, default, out VfioUapi.DeviceFeatureMigState answer);
        state = errno == Errno.None ? (VfioDeviceState)answer.DeviceState : default;
        return errno;
    }

    public Errno SetMigrationState(VfioDeviceState state, out IVfioMigrationData? data)
    {
        Errno errno = MigState(VfioFeatureOp.Set, state, out VfioUapi.DeviceFeatureMigState answer);
        data = errno == Errno.None && answer.DataFd >= 0 ? new KernelMigrationData(_kernel, new OwnedFd(answer.DataFd), _precopyInfoHasFlags) : null;
        return errno;
    }

    public Errno StartDmaLog(ulong pageSizeBytes, IReadOnlyList<GuestRange> ranges, out ulong inForceBytes)
    {
        var request = new Feature<VfioUapi.DeviceFeatureDmaLoggingControl>(VfioDeviceFeature.DmaLoggingStart, VfioFeatureOp.Set)
        {
            Data = { PageSize = pageSizeBytes, NumRanges = (uint)ranges.Count },
        };
        VfioUapi.DeviceFeatureDmaLoggingRange[] list =
            [.. ranges.Select(static r => new VfioUapi.DeviceFeatureDmaLoggingRange { Iova = r.Start.Value, Length = r.LengthBytes })];
        int pointer = FeatureHeaderBytes + (int)Marshal.OffsetOf<VfioUapi.DeviceFeatureDmaLoggingControl>(nameof(VfioUapi.DeviceFeatureDmaLoggingControl.Ranges));
        Errno errno = _kernel.Call(_fd, VfioUapi.VFIO_DEVICE_FEATURE, ref request, pointer, Ioctl.AsBytes(list.AsSpan()));
        inForceBytes = errno == Errno.None ? request.Data.PageSize : 0;
        return errno;
    }

    public Errno StopDmaLog() => DeviceFeature(VfioDeviceFeature.DmaLoggingStop, VfioFeatureOp.Set, default);

    public Errno ReportDmaLog(GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap)
    {
        // The kernel writes one bit per page and does not know the length of the bitmap.
        if (pageSizeBytes == 0 || (ulong)bitmap.Length * 64 < Pages(range.LengthBytes, pageSizeBytes)) return Errno.EINVAL;
        var request = new Feature<VfioUapi.DeviceFeatureDmaLoggingReport>(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get)
        {
            Data = { Iova = range.Start.Value, Length = range.LengthBytes, PageSize = pageSizeBytes },
        };
        int pointer = FeatureHeaderBytes + (int)Marshal.OffsetOf<VfioUapi.DeviceFeatureDmaLoggingReport>(nameof(VfioUapi.DeviceFeatureDmaLoggingReport.Bitmap));
        return _kernel.Call(_fd, VfioUapi.VFIO_DEVICE_FEATURE, ref request, pointer, Ioctl.AsBytes(bitmap));
    }

    private static ulong Pages(ulong lengthBytes, ulong pageBytes) => (lengthBytes / pageBytes) + (lengthBytes % pageBytes == 0 ? 0UL : 1);

    private static VfioUapi.DeviceFeature FeatureHeader(VfioDeviceFeature feature, VfioFeatureOp op, int dataBytes) =>
        new() { Argsz = (uint)(FeatureHeaderBytes + dataBytes), Flags = (uint)op | (uint)feature };

    private Errno MigState(VfioFeatureOp op, VfioDeviceState state, out VfioUapi.DeviceFeatureMigState answer)
    {
        var request = new Feature<VfioUapi.DeviceFeatureMigState>(VfioDeviceFeature.MigDeviceState, op) { Data = { DeviceState = (uint)state, DataFd = -1 } };
        Errno errno = _kernel.Call(_fd, VfioUapi.VFIO_DEVICE_FEATURE, ref request);
        answer = request.Data;
        return errno;
    }

    /// <summary>DEVICE_FEATURE with its data behind the header.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Feature<T>(VfioDeviceFeature feature, VfioFeatureOp op) where T : unmanaged
    {
        internal VfioUapi.DeviceFeature Header = FeatureHeader(feature, op, Marshal.SizeOf<T>());
        internal T Data = default;
    }
}
