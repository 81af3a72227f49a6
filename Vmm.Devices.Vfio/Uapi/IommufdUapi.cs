using System.Runtime.InteropServices;

namespace Vmm.Devices.Vfio.Uapi;

/// <summary>
/// Structures and numbers of <c>&lt;linux/iommufd.h&gt;</c>: C names are <c>iommu_</c> and ours in lower case with underscores, numbers carry
/// their C names. Every structure begins with its own size (vfio-migration 1.1, 1.3, 1.10).
/// </summary>
internal static class IommufdUapi
{
    internal const uint IOMMU_DESTROY = 0x3b80, IOMMU_IOAS_ALLOC = 0x3b81, IOMMU_IOAS_ALLOW_IOVAS = 0x3b82, IOMMU_IOAS_COPY = 0x3b83, IOMMU_IOAS_IOVA_RANGES = 0x3b84,
        IOMMU_IOAS_MAP = 0x3b85, IOMMU_IOAS_UNMAP = 0x3b86, IOMMU_OPTION = 0x3b87, IOMMU_VFIO_IOAS = 0x3b88, IOMMU_HWPT_ALLOC = 0x3b89, IOMMU_GET_HW_INFO = 0x3b8a,
        IOMMU_HWPT_SET_DIRTY_TRACKING = 0x3b8b, IOMMU_HWPT_GET_DIRTY_BITMAP = 0x3b8c;

    // Linux 6.13 and 6.14.
    internal const uint IOMMU_IOAS_MAP_FILE = 0x3b8f, IOMMU_IOAS_CHANGE_PROCESS = 0x3b92;

    internal const uint IOMMU_IOAS_MAP_FIXED_IOVA = 1, IOMMU_IOAS_MAP_WRITEABLE = 2, IOMMU_IOAS_MAP_READABLE = 4;
    internal const uint IOMMU_HWPT_ALLOC_NEST_PARENT = 1, IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 2, IOMMU_HWPT_FAULT_ID_VALID = 4, IOMMU_HWPT_ALLOC_PASID = 8;
    internal const ulong IOMMU_HW_CAP_DIRTY_TRACKING = 1;
    internal const uint IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1;

    [StructLayout(LayoutKind.Sequential)]
    internal struct Destroy
    {
        internal uint Size;
        internal uint Id;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasAlloc
    {
        internal uint Size;
        internal uint Flags;
        internal uint OutIoasId;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IovaRange
    {
        internal ulong Start;
        internal ulong Last;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasIovaRanges
    {
        internal uint Size;
        internal uint IoasId;
        internal uint NumIovas;
        internal uint Reserved;
        internal ulong AllowedIovas;
        internal ulong OutIovaAlignment;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasMap
    {
        internal uint Size;
        internal uint Flags;
        internal uint IoasId;
        internal uint Reserved;
        internal ulong UserVa;
        internal ulong Length;
        internal ulong Iova;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasMapFile
    {
        internal uint Size;
        internal uint Flags;
        internal uint IoasId;
        internal int Fd;
        internal ulong Start;
        internal ulong Length;
        internal ulong Iova;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasUnmap
    {
        internal uint Size;
        internal uint IoasId;
        internal ulong Iova;
        internal ulong Length;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IoasChangeProcess
    {
        internal uint Size;
        internal uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct HwptAlloc
    {
        internal uint Size;
        internal uint Flags;
        internal uint DevId;
        internal uint PtId;
        internal uint OutHwptId;
        internal uint Reserved;
        internal uint DataType;
        internal uint DataLen;
        internal ulong DataUptr;
        internal uint FaultId;
        internal uint Reserved2;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct HwInfo
    {
        internal uint Size;
        internal uint Flags;
        internal uint DevId;
        internal uint DataLen;
        internal ulong DataUptr;
        internal uint OutDataType;
        internal byte OutMaxPasidLog2;
        internal byte Reserved;
        internal ushort Reserved2;
        internal ulong OutCapabilities;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct HwptSetDirtyTracking
    {
        internal uint Size;
        internal uint Flags;
        internal uint HwptId;
        internal uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct HwptGetDirtyBitmap
    {
        internal uint Size;
        internal uint HwptId;
        internal uint Flags;
        internal uint Reserved;
        internal ulong Iova;
        internal ulong Length;
        internal ulong PageSize;
        internal ulong Data;
    }
}
