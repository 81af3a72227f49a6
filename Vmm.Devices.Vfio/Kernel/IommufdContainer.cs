using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// One iommufd address space (IOAS) and the hardware page tables over it (vfio-migration 1.3, 1.10). Mediated devices attach to the address
/// space itself: their drivers pin memory and write to it, so the hardware logs none of their writes.
/// </summary>
internal sealed class IommufdContainer : KernelContainer
{
    /// <summary>1 GiB, so that one query has a bitmap of 32 KiB.</summary>
    private const ulong QueryBytes = 1 << 30;
    private const int BitmapPointerOffset = 40, RangesPointerOffset = 16, MostRanges = 4096;

    private readonly OwnedFd _iommufd;
    private readonly IVfioKernel _kernel;
    private readonly List<Hwpt> _hwpts = [];
    private bool _canMapFiles = true;
    private bool _isLogging;
    private int _direct;

    private IommufdContainer(OwnedFd iommufd, uint ioasId, IVfioKernel kernel, ILogger logger) : base($"iommufd address space {ioasId}", logger) =>
        (_iommufd, IoasId, _kernel) = (iommufd, ioasId, kernel);

    /// <inheritdoc/>
    /// <remarks>True when every device is attached to a page table with dirty tracking.</remarks>
    public override bool CanLogDirty => _hwpts.Count > 0 && _direct == 0 && _hwpts.TrueForAll(static h => h.TracksDirty);

    /// <inheritdoc/>
    /// <remarks>The kernel has no limit; this class splits long ranges.</remarks>
    public override ulong MaxDirtyBitmapBytes => CanLogDirty ? ulong.MaxValue : 0;

    /// <summary>Id of the address space.</summary>
    internal uint IoasId { get; }

    /// <summary>Devices in it.</summary>
    internal int DeviceCount => _direct + _hwpts.Sum(static h => h.Users);

    /// <inheritdoc/>
    protected override ulong MaxQueryBytes => QueryBytes;

    /// <summary>Why devices under iommufd are not handed to another process, even where the kernel could do it.</summary>
    internal const string NoCpr = "an IOMMUFD device cannot be handed to another process in this version of vmm; with iommufd=off it can";

    /// <summary>
    /// Why its devices cannot change process. To find out, asks the kernel to change the address space to the present process: that does nothing,
    /// and fails where a change to another process would (vfio-migration 7.5; QEMU: <c>vfio_cpr_supported</c>).
    /// </summary>
    internal string CprBlockedReason
    {
        get
        {
            var change = new IommufdUapi.IoasChangeProcess { Size = (uint)Marshal.SizeOf<IommufdUapi.IoasChangeProcess>() };
            return _kernel.Call(_iommufd, IommufdUapi.IOMMU_IOAS_CHANGE_PROCESS, ref change) switch
            {
                Errno.None => NoCpr,
                Errno.ENOTTY => "the kernel's iommufd cannot change process: it has no IOMMU_IOAS_CHANGE_PROCESS, which Linux 6.13 brought; with iommufd=off it can",
                Errno.EINVAL => "the kernel's iommufd cannot change process: some guest memory is mapped by address, not by file (IOMMU_IOAS_CHANGE_PROCESS says EINVAL)",
                Errno other => $"the kernel's iommufd cannot change process: IOMMU_IOAS_CHANGE_PROCESS: {Posix.Describe(other)}",
            };
        }
    }

    /// <summary>Makes an address space.</summary>
    /// <param name="iommufd">Descriptor of /dev/iommu; stays the caller's and open for the life of the container.</param>
    /// <param name="kernel">System calls.</param>
    /// <param name="logger">Logger.</param>
    /// <exception cref="VfioException">The kernel refused.</exception>
    internal static IommufdContainer Allocate(OwnedFd iommufd, IVfioKernel kernel, ILogger logger)
    {
        var request = new IommufdUapi.IoasAlloc { Size = (uint)Marshal.SizeOf<IommufdUapi.IoasAlloc>() };
        Errno errno = kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_ALLOC, ref request);
        return errno == Errno.None ? new IommufdContainer(iommufd, request.OutIoasId, kernel, logger)
            : throw new VfioException($"iommufd: cannot make an address space: {Posix.Describe(errno)}", errno);
    }

    /// <summary>Attaches a bound device: a physical one to an existing or a new page table, a mediated one to the address space.</summary>
    /// <param name="device">Its descriptor.</param>
    /// <param name="deviceId">Its id from the bind.</param>
    /// <param name="seat">The device's attachment; dispose it after the device was closed.</param>
    /// <returns>EINVAL and similar errors when the device does not fit this address space; a new one may fit.</returns>
    internal Errno TryAttach(OwnedFd device, uint deviceId, out IDisposable? seat)
    {
        Errno errno = Place(device, deviceId, out seat);
        if (errno != Errno.None) return errno;
        errno = ReadRanges();
        if (errno == Errno.None) return errno;
        // The kernel destroys a page table only after its last device has left.
        var detach = new VfioUapi.DeviceDetachIommufdPt { Argsz = 8 };
        Errno left = _kernel.Call(device, VfioUapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, ref detach);
        if (left != Errno.None) VfioKernelLog.CleanupFailed(Logger, Name, "detaching a device", left);
        seat!.Dispose();
        seat = null;
        return errno;
    }

    public override Errno StartDirtyLog()
    {
        if (!CanLogDirty) return Errno.EOPNOTSUPP;
        Errno errno = SetTrackingOfAll(true);
        _isLogging = errno == Errno.None;
        return errno;
    }

    public override Errno StopDirtyLog()
    {
        _isLogging = false;
        return SetTrackingOfAll(false);
    }

    public override void Dispose() => Destroy(IoasId);

    protected override Errno Map(GuestRange piece, RamBlock block, ulong offsetBytes, bool isWritable)
    {
        uint flags = IommufdUapi.IOMMU_IOAS_MAP_FIXED_IOVA | IommufdUapi.IOMMU_IOAS_MAP_READABLE | (isWritable ? IommufdUapi.IOMMU_IOAS_MAP_WRITEABLE : 0);
        // Maps by file where the kernel allows it (memfds only), because only such mappings survive a change of the process.
        if (_canMapFiles && block.IsShared && block.FilePath is null)
        {
            Errno errno = block.Fd.Lend(fd =>
            {
                var file = new IommufdUapi.IoasMapFile
                {
                    Size = (uint)Marshal.SizeOf<IommufdUapi.IoasMapFile>(), Flags = flags, IoasId = IoasId, Fd = fd, Start = offsetBytes, Length = piece.LengthBytes, Iova = piece.Start.Value,
                };
                return _kernel.Call(_iommufd, IommufdUapi.IOMMU_IOAS_MAP_FILE, ref file);
            });
            if (errno != Errno.ENOTTY) return errno;
            _canMapFiles = false;
        }
        var map = new IommufdUapi.IoasMap
        {
            Size = (uint)Marshal.SizeOf<IommufdUapi.IoasMap>(), Flags = flags, IoasId = IoasId, UserVa = (ulong)block.HostAddress + offsetBytes, Length = piece.LengthBytes, Iova = piece.Start.Value,
        };
        return _kernel.Call(_iommufd, IommufdUapi.IOMMU_IOAS_MAP, ref map);
    }

    protected override Errno Unmap(GuestRange piece)
    {
        var unmap = new IommufdUapi.IoasUnmap { Size = (uint)Marshal.SizeOf<IommufdUapi.IoasUnmap>(), IoasId = IoasId, Iova = piece.Start.Value, Length = piece.LengthBytes };
        Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_IOAS_UNMAP, ref unmap);
        return errno == Errno.ENOENT ? Errno.None : errno;
    }

    protected override Errno Query(GuestRange range, Span<ulong> words)
    {
        foreach (Hwpt hwpt in _hwpts)
        {
            var request = new IommufdUapi.HwptGetDirtyBitmap
            {
                Size = (uint)Marshal.SizeOf<IommufdUapi.HwptGetDirtyBitmap>(), HwptId = hwpt.Id, Iova = range.Start.Value, Length = range.LengthBytes, PageSize = PageBytes,
            };
            // The kernel only sets bits, so all tables may share one bitmap.
            Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_HWPT_GET_DIRTY_BITMAP, ref request, BitmapPointerOffset, Ioctl.AsBytes(words));
            if (errno != Errno.None) return errno;
        }
        return Errno.None;
    }

    private Errno Place(OwnedFd device, uint deviceId, out IDisposable? seat)
    {
        seat = null;
        var info = new IommufdUapi.HwInfo { Size = (uint)Marshal.SizeOf<IommufdUapi.HwInfo>(), DevId = deviceId };
        Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_GET_HW_INFO, ref info);
        if (errno is Errno.ENOENT or Errno.ENOTTY)
        {
            // ENOENT: a mediated device has no hardware page table. ENOTTY: kernels before 6.6 make the page tables themselves.
            errno = Attach(device, IoasId);
            if (errno != Errno.None) return errno;
            _direct++;
            seat = new Core.Registration(() => _direct--);
            return Errno.None;
        }
        if (errno != Errno.None) return errno;
        Hwpt? hwpt = _hwpts.Find(h => Attach(device, h.Id) == Errno.None);
        if (hwpt is null)
        {
            bool tracks = (info.OutCapabilities & IommufdUapi.IOMMU_HW_CAP_DIRTY_TRACKING) != 0;
            errno = AllocateHwpt(deviceId, ref tracks, out uint id);
            if (errno != Errno.None) return errno;
            if (tracks && _isLogging) errno = SetTracking(id, true);
            if (errno == Errno.None) errno = Attach(device, id);
            if (errno != Errno.None)
            {
                Destroy(id);
                return errno;
            }
            _hwpts.Add(hwpt = new Hwpt(id, tracks));
        }
        hwpt.Users++;
        seat = new Core.Registration(() => Leave(hwpt));
        return Errno.None;
    }

    private Errno Attach(OwnedFd device, uint pageTable)
    {
        // 12 bytes, the structure's length before PASIDs: every kernel accepts it.
        var attach = new VfioUapi.DeviceAttachIommufdPt { Argsz = 12, PtId = pageTable };
        return _kernel.Call(device, VfioUapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, ref attach);
    }

    private Errno AllocateHwpt(uint deviceId, ref bool tracks, out uint id)
    {
        while (true)
        {
            var request = new IommufdUapi.HwptAlloc
            {
                Size = (uint)Marshal.SizeOf<IommufdUapi.HwptAlloc>(), DevId = deviceId, PtId = IoasId, Flags = tracks ? IommufdUapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING : 0,
            };
            Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_HWPT_ALLOC, ref request);
            id = request.OutHwptId;
            if (errno != Errno.EOPNOTSUPP || !tracks) return errno;
            tracks = false;
        }
    }

    private void Leave(Hwpt hwpt)
    {
        if (--hwpt.Users > 0) return;
        _hwpts.Remove(hwpt);
        Destroy(hwpt.Id);
    }

    private Errno SetTrackingOfAll(bool on)
    {
        Errno first = Errno.None;
        foreach (Hwpt hwpt in _hwpts.Where(static h => h.TracksDirty))
        {
            Errno errno = SetTracking(hwpt.Id, on);
            if (first == Errno.None) first = errno;
        }
        if (on && first != Errno.None) SetTrackingOfAll(false);
        return first;
    }

    private Errno SetTracking(uint id, bool on)
    {
        var request = new IommufdUapi.HwptSetDirtyTracking
        {
            Size = (uint)Marshal.SizeOf<IommufdUapi.HwptSetDirtyTracking>(), HwptId = id, Flags = on ? IommufdUapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE : 0,
        };
        return _kernel.Call(_iommufd, IommufdUapi.IOMMU_HWPT_SET_DIRTY_TRACKING, ref request);
    }

    private void Destroy(uint id)
    {
        var request = new IommufdUapi.Destroy { Size = (uint)Marshal.SizeOf<IommufdUapi.Destroy>(), Id = id };
        Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_DESTROY, ref request);
        if (errno != Errno.None) VfioKernelLog.CleanupFailed(Logger, Name, $"destroying object {id}", errno);
    }

    /// <summary>Reads which addresses the attached devices can use. The kernel says how many ranges there are when the buffer is too small.</summary>
    private Errno ReadRanges()
    {
        IommufdUapi.IovaRange[] ranges = new IommufdUapi.IovaRange[16];
        while (true)
        {
            var request = new IommufdUapi.IoasIovaRanges { Size = (uint)Marshal.SizeOf<IommufdUapi.IoasIovaRanges>(), IoasId = IoasId, NumIovas = (uint)ranges.Length };
            Errno errno = _kernel.Call(_iommufd, IommufdUapi.IOMMU_IOAS_IOVA_RANGES, ref request, RangesPointerOffset, Ioctl.AsBytes(ranges.AsSpan()));
            if (errno is not (Errno.None or Errno.EMSGSIZE)) return errno;
            if (request.NumIovas > MostRanges) return Errno.EPROTO;
            if (request.NumIovas <= ranges.Length)
            {
                UsableRanges = [.. ranges.Take((int)request.NumIovas).Select(static r => (r.Start, r.Last))];
                return Errno.None;
            }
            ranges = new IommufdUapi.IovaRange[request.NumIovas];
        }
    }

    /// <summary>A hardware page table.</summary>
    private sealed class Hwpt(uint id, bool tracksDirty)
    {
        internal uint Id => id;

        internal bool TracksDirty => tracksDirty;

        internal int Users { get; set; }
    }
}
