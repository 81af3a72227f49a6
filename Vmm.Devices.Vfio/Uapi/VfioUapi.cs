using System.Runtime.InteropServices;

namespace Vmm.Devices.Vfio.Uapi;

/// <summary>
/// Structures of <c>&lt;linux/vfio.h&gt;</c>: their C names are <c>vfio_</c> and ours in lower case with underscores, fields alike; a flexible
/// array at the end is left out. A test compares all of it with a C compiler's view (vfio-migration 1).
/// </summary>
internal static partial class VfioUapi
{
    [StructLayout(LayoutKind.Sequential)]
    internal struct InfoCapHeader
    {
        internal ushort Id;
        internal ushort Version;
        internal uint Next;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct GroupStatus
    {
        internal uint Argsz;
        internal uint Flags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceInfo
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint NumRegions;
        internal uint NumIrqs;
        internal uint CapOffset;
        internal uint Pad;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct RegionInfo
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Index;
        internal uint CapOffset;
        internal ulong Size;
        internal ulong Offset;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct RegionSparseMmapArea
    {
        internal ulong Offset;
        internal ulong Size;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct RegionInfoCapSparseMmap
    {
        internal InfoCapHeader Header;
        internal uint NrAreas;
        internal uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct RegionInfoCapType
    {
        internal InfoCapHeader Header;
        internal uint Type;
        internal uint Subtype;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IrqInfo
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Index;
        internal uint Count;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IrqSet
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Index;
        internal uint Start;
        internal uint Count;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct PciDependentDevice
    {
        internal uint GroupId;
        internal ushort Segment;
        internal byte Bus;
        internal byte Devfn;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct PciHotResetInfo
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Count;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct PciHotReset
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Count;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeature
    {
        internal uint Argsz;
        internal uint Flags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceBindIommufd
    {
        internal uint Argsz;
        internal uint Flags;
        internal int Iommufd;
        internal uint OutDevid;
        internal ulong TokenUuidPtr;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceAttachIommufdPt
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint PtId;
        internal uint Pasid;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceDetachIommufdPt
    {
        internal uint Argsz;
        internal uint Flags;
        internal uint Pasid;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureMigration
    {
        internal ulong Flags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureMigState
    {
        internal uint DeviceState;
        internal int DataFd;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct PrecopyInfo
    {
        internal uint Argsz;
        internal uint Flags;
        internal ulong InitialBytes;
        internal ulong DirtyBytes;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureDmaLoggingControl
    {
        internal ulong PageSize;
        internal uint NumRanges;
        internal uint Reserved;
        internal ulong Ranges;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureDmaLoggingRange
    {
        internal ulong Iova;
        internal ulong Length;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureDmaLoggingReport
    {
        internal ulong Iova;
        internal ulong Length;
        internal ulong PageSize;
        internal ulong Bitmap;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceFeatureMigDataSize
    {
        internal ulong StopCopyLength;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1Info
    {
        internal uint Argsz;
        internal uint Flags;
        internal ulong IovaPgsizes;
        internal uint CapOffset;
        internal uint Pad;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IovaRange
    {
        internal ulong Start;
        internal ulong End;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1InfoCapIovaRange
    {
        internal InfoCapHeader Header;
        internal uint NrIovas;
        internal uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1InfoCapMigration
    {
        internal InfoCapHeader Header;
        internal uint Flags;
        internal ulong PgsizeBitmap;
        internal ulong MaxDirtyBitmapSize;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1InfoDmaAvail
    {
        internal InfoCapHeader Header;
        internal uint Avail;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1DmaMap
    {
        internal uint Argsz;
        internal uint Flags;
        internal ulong Vaddr;
        internal ulong Iova;
        internal ulong Size;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1DmaUnmap
    {
        internal uint Argsz;
        internal uint Flags;
        internal ulong Iova;
        internal ulong Size;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct Bitmap
    {
        internal ulong Pgsize;
        internal ulong Size;
        internal ulong Data;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1DirtyBitmap
    {
        internal uint Argsz;
        internal uint Flags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IommuType1DirtyBitmapGet
    {
        internal ulong Iova;
        internal ulong Size;
        internal Bitmap Bitmap;
    }
}
