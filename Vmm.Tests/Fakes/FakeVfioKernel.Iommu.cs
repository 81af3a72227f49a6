using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Fakes;

/// <summary>The IOMMU of the fake kernel: mappings and dirty log of type1, objects of iommufd.</summary>
internal sealed partial class FakeVfioKernel
{
    private uint _nextId = 100;

    /// <summary>The capability chain of VFIO_IOMMU_GET_INFO. It lies behind the 24 bytes of the structure, so its first offset is 24.</summary>
    internal byte[] Type1Caps { get; set; } = [];

    /// <summary>The mappings of type1 and of iommufd, by IOVA.</summary>
    internal SortedDictionary<ulong, (ulong Size, ulong From, uint Flags)> Mappings { get; } = [];

    /// <summary>Address ranges that iommufd offers.</summary>
    internal (ulong First, ulong Last)[] IovaRanges { get; set; } = [(0, ulong.MaxValue)];

    internal ulong HwCapabilities { get; set; }

    /// <summary>Whether iommufd has IOMMU_IOAS_CHANGE_PROCESS, as Linux 6.13 does.</summary>
    internal bool ChangesProcess { get; set; }

    /// <summary>Page numbers of the dirty pages; a query clears those that it reports.</summary>
    internal HashSet<ulong> DirtyPages { get; } = [];

    /// <summary>The dirty queries, in order: IOVA, length, bytes of the bitmap.</summary>
    internal List<(ulong Iova, ulong Length, int BitmapBytes)> Queries { get; } = [];

    private int Container(Node node, uint request, Span<byte> argument, Span<byte> pointee, out Errno errno)
    {
        errno = Errno.None;
        if (!node.HasIommu) return Fail(Errno.EINVAL, out errno);
        switch (request)
        {
            case VfioUapi.VFIO_IOMMU_GET_INFO:
                bool fits = argument.Length >= 24 + Type1Caps.Length;
                var info = new VfioUapi.IommuType1Info
                {
                    Argsz = (uint)(24 + Type1Caps.Length), Flags = 1 | (Type1Caps.Length > 0 ? VfioUapi.VFIO_IOMMU_INFO_CAPS : 0), IovaPgsizes = 0x1000, CapOffset = Type1Caps.Length > 0 && fits ? 24u : 0,
                };
                Core.Interop.Ioctl.AsBytes(ref info).CopyTo(argument);
                if (fits) Type1Caps.CopyTo(argument[24..]);
                return 0;
            case VfioUapi.VFIO_IOMMU_MAP_DMA:
                var map = Core.Interop.Ioctl.Read<VfioUapi.IommuType1DmaMap>(argument);
                return (map.Flags & VfioUapi.VFIO_DMA_MAP_FLAG_VADDR) != 0 ? Move(map, out errno) : Map(map.Iova, map.Size, map.Vaddr, map.Flags, out errno);
            case VfioUapi.VFIO_IOMMU_UNMAP_DMA:
                var unmap = Core.Interop.Ioctl.Read<VfioUapi.IommuType1DmaUnmap>(argument);
                if ((unmap.Flags & VfioUapi.VFIO_DMA_UNMAP_FLAG_VADDR) != 0) return Suspend(unmap, out errno);
                return Unmap(unmap.Iova, unmap.Size, out errno);
            default:
                var dirty = Core.Interop.Ioctl.Read<VfioUapi.IommuType1DirtyBitmap>(argument);
                Calls[^1] += $" {dirty.Flags}";
                if (dirty.Flags != VfioUapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP) return 0;
                var get = Core.Interop.Ioctl.Read<VfioUapi.IommuType1DirtyBitmapGet>(argument[8..]);
                if (get.Bitmap.Size != (ulong)pointee.Length || get.Bitmap.Pgsize != 4096 || !Mappings.ContainsKey(get.Iova)) return Fail(Errno.EINVAL, out errno);
                return TakeDirty(get.Iova, get.Size, pointee);
        }
    }

    private int Iommufd(uint request, Span<byte> argument, Span<byte> pointee, out Errno errno)
    {
        errno = Errno.None;
        switch (request)
        {
            case IommufdUapi.IOMMU_IOAS_ALLOC:
                var alloc = new IommufdUapi.IoasAlloc { Size = 12, OutIoasId = _nextId++ };
                Core.Interop.Ioctl.AsBytes(ref alloc).CopyTo(argument);
                return 0;
            case IommufdUapi.IOMMU_GET_HW_INFO:
                var info = Core.Interop.Ioctl.Read<IommufdUapi.HwInfo>(argument);
                if (Devices[(int)info.DevId - 1].IsMediated) return Fail(Errno.ENOENT, out errno);
                info.OutCapabilities = HwCapabilities;
                Core.Interop.Ioctl.AsBytes(ref info).CopyTo(argument);
                return 0;
            case IommufdUapi.IOMMU_HWPT_ALLOC:
                var hwpt = Core.Interop.Ioctl.Read<IommufdUapi.HwptAlloc>(argument);
                Calls[^1] += $" {hwpt.Flags}";
                if (Refused(Calls[^1], out errno, log: false)) return -1;
                hwpt.OutHwptId = _nextId++;
                Core.Interop.Ioctl.AsBytes(ref hwpt).CopyTo(argument);
                return 0;
            case IommufdUapi.IOMMU_IOAS_IOVA_RANGES:
                var ranges = Core.Interop.Ioctl.Read<IommufdUapi.IoasIovaRanges>(argument);
                bool fits = IovaRanges.Length <= ranges.NumIovas;
                for (int i = 0; i < IovaRanges.Length && fits; i++)
                {
                    BitConverter.TryWriteBytes(pointee[(16 * i)..], IovaRanges[i].First);
                    BitConverter.TryWriteBytes(pointee[((16 * i) + 8)..], IovaRanges[i].Last);
                }
                ranges.NumIovas = (uint)IovaRanges.Length;
                Core.Interop.Ioctl.AsBytes(ref ranges).CopyTo(argument);
                return fits ? 0 : Fail(Errno.EMSGSIZE, out errno);
            case IommufdUapi.IOMMU_IOAS_MAP:
                var map = Core.Interop.Ioctl.Read<IommufdUapi.IoasMap>(argument);
                return Map(map.Iova, map.Length, map.UserVa, map.Flags, out errno);
            case IommufdUapi.IOMMU_IOAS_MAP_FILE:
                var file = Core.Interop.Ioctl.Read<IommufdUapi.IoasMapFile>(argument);
                return Map(file.Iova, file.Length, file.Start, file.Flags, out errno);
            case IommufdUapi.IOMMU_IOAS_CHANGE_PROCESS:
                return ChangesProcess ? 0 : Fail(Errno.ENOTTY, out errno);
            case IommufdUapi.IOMMU_IOAS_UNMAP:
                var unmap = Core.Interop.Ioctl.Read<IommufdUapi.IoasUnmap>(argument);
                return Unmap(unmap.Iova, unmap.Length, out errno);
            case IommufdUapi.IOMMU_HWPT_SET_DIRTY_TRACKING:
                var set = Core.Interop.Ioctl.Read<IommufdUapi.HwptSetDirtyTracking>(argument);
                Calls[^1] += $" {set.HwptId} {set.Flags}";
                return Refused(Calls[^1], out errno, log: false) ? -1 : 0;
            case IommufdUapi.IOMMU_HWPT_GET_DIRTY_BITMAP:
                var get = Core.Interop.Ioctl.Read<IommufdUapi.HwptGetDirtyBitmap>(argument);
                return TakeDirty(get.Iova, get.Length, pointee);
            case IommufdUapi.IOMMU_DESTROY:
                Calls[^1] += $" {Core.Interop.Ioctl.Read<IommufdUapi.Destroy>(argument).Id}";
                return 0;
            default: return Fail(Errno.ENOTTY, out errno);
        }
    }

    /// <summary>IOVAs of the mappings whose vaddr is invalid (VFIO_DMA_UNMAP_FLAG_VADDR).</summary>
    internal SortedSet<ulong> Suspended { get; } = [];

    /// <summary>Actions of another process. Each runs once, right before the next mapping gets a new vaddr.</summary>
    internal Queue<Action> BeforeMoves { get; } = [];

    private int Suspend(VfioUapi.IommuType1DmaUnmap unmap, out Errno errno)
    {
        errno = Errno.None;
        Calls[^1] += " VADDR";
        if (Refused(Calls[^1], out errno, log: false)) return -1;
        bool all = (unmap.Flags & VfioUapi.VFIO_DMA_UNMAP_FLAG_ALL) != 0;
        if (all ? (unmap.Iova | unmap.Size) != 0 : !Mappings.TryGetValue(unmap.Iova, out var one) || one.Size != unmap.Size) return Fail(Errno.EINVAL, out errno);
        // As in the kernel, the call suspends all or nothing, and no mapping twice.
        IEnumerable<ulong> places = all ? Mappings.Keys : [unmap.Iova];
        if (places.Any(Suspended.Contains)) return Fail(Errno.EINVAL, out errno);
        Suspended.UnionWith(places);
        return 0;
    }

    private int Move(VfioUapi.IommuType1DmaMap map, out Errno errno)
    {
        string call = Calls[^1] += " VADDR";
        if (BeforeMoves.TryDequeue(out Action? meanwhile)) meanwhile();
        if (Refused(call, out errno, log: false)) return -1;
        if (map.Flags != VfioUapi.VFIO_DMA_MAP_FLAG_VADDR || !Mappings.TryGetValue(map.Iova, out (ulong Size, ulong From, uint Flags) old) || old.Size != map.Size || !Suspended.Remove(map.Iova))
            return Fail(Errno.EINVAL, out errno);
        Mappings[map.Iova] = (old.Size, map.Vaddr, old.Flags);
        return 0;
    }

    private int Map(ulong iova, ulong size, ulong from, uint flags, out Errno errno)
    {
        errno = Errno.None;
        if (Mappings.Any(m => m.Key < iova + size && iova < m.Key + m.Value.Size)) return Fail(Errno.EEXIST, out errno);
        Mappings.Add(iova, (size, from, flags));
        return 0;
    }

    private int Unmap(ulong iova, ulong size, out Errno errno)
    {
        errno = Errno.None;
        return Mappings.Remove(iova, out (ulong Size, ulong, uint) old) && old.Size == size ? 0 : Fail(Errno.ENOENT, out errno);
    }

    private int TakeDirty(ulong iova, ulong length, Span<byte> bitmap)
    {
        Queries.Add((iova, length, bitmap.Length));
        foreach (ulong page in DirtyPages.Where(p => p >= iova / 4096 && p < (iova + length) / 4096).ToArray())
        {
            DirtyPages.Remove(page);
            int bit = (int)(page - (iova / 4096));
            bitmap[bit / 8] |= (byte)(1 << (bit % 8));
        }
        return 0;
    }
}
