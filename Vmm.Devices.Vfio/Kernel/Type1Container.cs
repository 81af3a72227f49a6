using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// A <c>/dev/vfio/vfio</c> container with the type1v2 IOMMU and one or more groups (vfio-migration 1.2, 1.8, 1.9). No hardware supports its
/// dirty log: every query reports all mapped pages, or the pinned ones when all devices' drivers pin pages themselves.
/// </summary>
internal sealed partial class Type1Container : KernelContainer
{
    /// <summary>Offset of the bitmap's address in DIRTY_PAGES GET: behind header (8 bytes), iova, size, page size and bitmap size.</summary>
    private const int BitmapPointerOffset = 40;

    private readonly OwnedFd _fd;
    private readonly IVfioKernel _kernel;
    private readonly List<VfioGroup> _groups = [];
    private ulong _maxDirtyBitmapBytes;
    private uint? _dmaAvailable;

    private Type1Container(OwnedFd fd, IVfioKernel kernel, string name, ILogger logger) : base(name, logger) => (_fd, _kernel) = (fd, kernel);

    public override bool CanLogDirty => _maxDirtyBitmapBytes > 0;

    public override ulong MaxDirtyBitmapBytes => _maxDirtyBitmapBytes;

    /// <summary>Its descriptor, for a hand-over to another process.</summary>
    internal OwnedFd Fd => _fd;

    /// <summary>DMA mappings left when the info was last read; null when the kernel does not say.</summary>
    internal uint? DmaAvailable => _dmaAvailable;

    /// <summary>Groups in it.</summary>
    internal int GroupCount => _groups.Count;

    /// <inheritdoc/>
    protected override ulong MaxMappingBytes => _maxDirtyBitmapBytes is > 0 and < ulong.MaxValue / 8 / PageBytes ? _maxDirtyBitmapBytes * 8 * PageBytes : base.MaxMappingBytes;

    /// <inheritdoc/>
    /// <remarks>A query must cover whole mappings, so no mapping is longer than one bitmap can describe.</remarks>
    protected override ulong MaxQueryBytes => 0;

    /// <summary>Opens a container without groups.</summary>
    /// <exception cref="VfioException">No VFIO, another API, or no type1v2.</exception>
    internal static Type1Container Open(IVfioKernel kernel, VfioHostPaths paths, ILogger logger)
    {
        OwnedFd fd = kernel.Open(paths.Container, out Errno errno) ?? throw VfioOpenErrors.ContainerNode(paths.Container, errno);
        try
        {
            int version = kernel.Ioctl(fd, VfioUapi.VFIO_GET_API_VERSION, 0, out errno);
            if (errno != Errno.None) throw VfioOpenErrors.ContainerNode(paths.Container, errno);
            if (version != VfioUapi.VFIO_API_VERSION) throw VfioOpenErrors.ApiVersion(paths.Container, version);
            if (kernel.Ioctl(fd, VfioUapi.VFIO_CHECK_EXTENSION, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU, out _) <= 0) throw VfioOpenErrors.NoType1v2(paths.Container);
            return new Type1Container(fd, kernel, "type1 container", logger);
        }
        catch
        {
            fd.Dispose();
            throw;
        }
    }

    /// <summary>Adds a group; the first one sets the IOMMU. On failure the group is removed again.</summary>
    /// <returns>EINVAL and similar errors when the group's IOMMU does not fit the others'; a new container may fit.</returns>
    internal Errno TryAdd(VfioGroup group)
    {
        Errno errno = _fd.Lend(number => _kernel.Call(group.Fd, VfioUapi.VFIO_GROUP_SET_CONTAINER, ref number));
        if (errno != Errno.None) return errno;
        if (_groups.Count == 0) _kernel.Ioctl(_fd, VfioUapi.VFIO_SET_IOMMU, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU, out errno);
        if (errno == Errno.None) errno = ReadInfo();
        if (errno != Errno.None)
        {
            Unset(group);
            return errno;
        }
        _groups.Add(group);
        group.Container = this;
        return Errno.None;
    }

    /// <summary>Removes a group. Close all its devices before; before the last group, unmap all RAM.</summary>
    internal void Remove(VfioGroup group)
    {
        if (!_groups.Remove(group)) return;
        group.Container = null;
        if (!LeavesMappingsAlone) Unset(group);
    }

    /// <summary>CHECK_EXTENSION; not cached, because some answers depend on the groups in the container.</summary>
    internal bool HasExtension(uint extension) => _kernel.Ioctl(_fd, VfioUapi.VFIO_CHECK_EXTENSION, (nint)extension, out _) > 0;

    public override Errno StartDirtyLog() => DirtyPages(VfioUapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START);

    public override Errno StopDirtyLog() => DirtyPages(VfioUapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP);

    public override void Dispose() => _fd.Dispose();

    protected override Errno Map(GuestRange piece, RamBlock block, ulong offsetBytes, bool isWritable)
    {
        var map = new VfioUapi.IommuType1DmaMap
        {
            Argsz = (uint)Marshal.SizeOf<VfioUapi.IommuType1DmaMap>(),
            Flags = VfioUapi.VFIO_DMA_MAP_FLAG_READ | (isWritable ? VfioUapi.VFIO_DMA_MAP_FLAG_WRITE : 0),
            Vaddr = (ulong)block.HostAddress + offsetBytes,
            Iova = piece.Start.Value,
            Size = piece.LengthBytes,
        };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_MAP_DMA, ref map);
    }

    protected override Errno Unmap(GuestRange piece)
    {
        var unmap = new VfioUapi.IommuType1DmaUnmap { Argsz = (uint)Marshal.SizeOf<VfioUapi.IommuType1DmaUnmap>(), Iova = piece.Start.Value, Size = piece.LengthBytes };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_UNMAP_DMA, ref unmap);
    }

    protected override Errno Query(GuestRange range, Span<ulong> words)
    {
        var request = new DirtyGet
        {
            Header = { Argsz = (uint)Marshal.SizeOf<DirtyGet>(), Flags = VfioUapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP },
            Get = { Iova = range.Start.Value, Size = range.LengthBytes, Bitmap = { Pgsize = PageBytes, Size = (ulong)words.Length * sizeof(ulong) } },
        };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_DIRTY_PAGES, ref request, BitmapPointerOffset, Ioctl.AsBytes(words));
    }

    protected override string? MapHint(Errno errno) =>
        errno == Errno.ENOSPC && _dmaAvailable is { } n ? $"the container had {n} DMA mappings left (vfio_iommu_type1.dma_entry_limit)" : base.MapHint(errno);

    private Errno DirtyPages(uint flag)
    {
        var request = new VfioUapi.IommuType1DirtyBitmap { Argsz = (uint)Marshal.SizeOf<VfioUapi.IommuType1DirtyBitmap>(), Flags = flag };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_DIRTY_PAGES, ref request);
    }

    private void Unset(VfioGroup group)
    {
        _kernel.Ioctl(group.Fd, VfioUapi.VFIO_GROUP_UNSET_CONTAINER, 0, out Errno errno);
        if (errno != Errno.None) VfioKernelLog.CleanupFailed(Logger, Name, $"taking group {group.Number} out", errno);
    }

    /// <summary>Reads page sizes, usable addresses and limits; they change with the groups.</summary>
    private Errno ReadInfo()
    {
        var info = default(VfioUapi.IommuType1Info);
        Errno errno = _kernel.CallForInfo(_fd, VfioUapi.VFIO_IOMMU_GET_INFO, ref info, out byte[] bytes);
        if (errno != Errno.None) return errno;
        uint first = (info.Flags & VfioUapi.VFIO_IOMMU_INFO_CAPS) != 0 ? info.CapOffset : 0;
        var caps = new VfioCapabilities(bytes, Name);
        ReadOnlySpan<byte> ranges = caps.Find(first, VfioUapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 16);
        UsableRanges = ranges.IsEmpty ? [] : caps.Pairs(ranges, 16, BinaryPrimitives.ReadUInt32LittleEndian(ranges[8..]));
        ReadOnlySpan<byte> available = caps.Find(first, VfioUapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 12);
        _dmaAvailable = available.IsEmpty ? null : BinaryPrimitives.ReadUInt32LittleEndian(available[8..]);
        ReadOnlySpan<byte> migration = caps.Find(first, VfioUapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, Marshal.SizeOf<VfioUapi.IommuType1InfoCapMigration>());
        bool logs = !migration.IsEmpty && (Ioctl.Read<VfioUapi.IommuType1InfoCapMigration>(migration).PgsizeBitmap & PageBytes) != 0;
        _maxDirtyBitmapBytes = logs ? Ioctl.Read<VfioUapi.IommuType1InfoCapMigration>(migration).MaxDirtyBitmapSize : 0;
        return Errno.None;
    }

    /// <summary>DIRTY_PAGES with its GET part behind the header.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct DirtyGet
    {
        internal VfioUapi.IommuType1DirtyBitmap Header;
        internal VfioUapi.IommuType1DirtyBitmapGet Get;
    }
}
