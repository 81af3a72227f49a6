using System.Buffers.Binary;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>Fixed numbers of the vfio-user protocol and limits that we hold any peer to (spec vfio-user 1.2, 2, 14).</summary>
internal static class VfioUserLimits
{
    /// <summary>Default and our own largest count of one data message.</summary>
    internal const int DataXferBytes = 1 << 20;
    /// <summary>Data of one message towards a peer we did not write (C-3): libvfio-user receives a body in one call.</summary>
    internal const int SafeDataBytes = 64 << 10;
    /// <summary>Longest message body of a control command; also the longest VERSION reply (C-5).</summary>
    internal const int ControlBytes = 64 << 10;
    /// <summary>Header and fixed part before the data of a region, DMA or migration message, at most.</summary>
    internal const int DataHeadBytes = 32;
    /// <summary>Most regions of a device (QEMU's own limit).</summary>
    internal const uint Regions = 100;
    /// <summary>Most interrupt indices (QEMU's own limit).</summary>
    internal const uint Irqs = 50;
    /// <summary>Most vectors of one interrupt index (PCI's own limit for MSI-X).</summary>
    internal const uint Vectors = 2048;
    /// <summary>Most sparse areas of one region.</summary>
    internal const int SparseAreas = 64;
    /// <summary>Page size of areas, maps and bitmaps.</summary>
    internal const uint PageBytes = 4096;
    /// <summary>Most entries of one REGION_WRITE_MULTI (QEMU sends 200).</summary>
    internal const int WriteMultiEntries = 2048;
}

/// <summary>DEVICE_GET_INFO (spec 3.1): <c>u32 argsz, u32 flags (1 reset, 2 PCI), u32 num_regions, u32 num_irqs</c>, both ways.</summary>
internal readonly record struct VfioUserDeviceInfo(uint ArgSz, uint Flags, uint NumRegions, uint NumIrqs)
{
    internal const int Length = 16;
    internal const uint FlagReset = 1, FlagPci = 2;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDeviceInfo value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4), LittleEndian.U32(b, 8), LittleEndian.U32(b, 12)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
        LittleEndian.U32(b, 8, NumRegions);
        LittleEndian.U32(b, 12, NumIrqs);
    }
}

/// <summary>
/// DEVICE_GET_REGION_INFO (spec 3.2): <c>u32 argsz, u32 flags (1 r, 2 w, 4 mmap, 8 caps), u32 index, u32 cap_offset, u64 size, u64 offset</c>, both ways.
/// </summary>
internal readonly record struct VfioUserRegionInfo(uint ArgSz, uint Flags, uint Index, uint CapOffset, ulong Size, ulong Offset)
{
    internal const int Length = 32;
    internal const uint FlagRead = 1, FlagWrite = 2, FlagMmap = 4, FlagCaps = 8;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserRegionInfo value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4), LittleEndian.U32(b, 8), LittleEndian.U32(b, 12), LittleEndian.U64(b, 16), LittleEndian.U64(b, 24)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
        LittleEndian.U32(b, 8, Index);
        LittleEndian.U32(b, 12, CapOffset);
        LittleEndian.U64(b, 16, Size);
        LittleEndian.U64(b, 24, Offset);
    }
}

/// <summary>DEVICE_GET_REGION_IO_FDS (spec 3.3): <c>u32 argsz, u32 flags, u32 index, u32 count</c>, then entries in the reply.</summary>
internal readonly record struct VfioUserRegionIoFds(uint ArgSz, uint Flags, uint Index, uint Count)
{
    internal const int Length = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserRegionIoFds value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4), LittleEndian.U32(b, 8), LittleEndian.U32(b, 12)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
        LittleEndian.U32(b, 8, Index);
        LittleEndian.U32(b, 12, Count);
    }
}

/// <summary>DEVICE_GET_IRQ_INFO (spec 3.4): <c>u32 argsz, u32 flags, u32 index, u32 count</c>, both ways.</summary>
internal readonly record struct VfioUserIrqInfo(uint ArgSz, uint Flags, uint Index, uint Count)
{
    internal const int Length = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserIrqInfo value)
    {
        bool ok = VfioUserRegionIoFds.TryRead(b, out VfioUserRegionIoFds same);
        value = ok ? new(same.ArgSz, same.Flags, same.Index, same.Count) : default;
        return ok;
    }

    internal void Write(Span<byte> b) => new VfioUserRegionIoFds(ArgSz, Flags, Index, Count).Write(b);
}

/// <summary>DEVICE_SET_IRQS request (spec 3.5): <c>u32 argsz (20, or 20 + bools), u32 flags, u32 index, u32 start, u32 count</c>, then bools; the reply is a bare header.</summary>
internal readonly record struct VfioUserIrqSet(uint ArgSz, VfioIrqSetFlags Flags, uint Index, uint Start, uint Count)
{
    internal const int Length = 20;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserIrqSet value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), (VfioIrqSetFlags)LittleEndian.U32(b, 4), LittleEndian.U32(b, 8), LittleEndian.U32(b, 12), LittleEndian.U32(b, 16)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, (uint)Flags);
        LittleEndian.U32(b, 8, Index);
        LittleEndian.U32(b, 12, Start);
        LittleEndian.U32(b, 16, Count);
    }
}

/// <summary>REGION_READ, REGION_WRITE (spec 3.6): <c>u64 offset, u32 region, u32 count</c>, then data in the write request and the read reply.</summary>
internal readonly record struct VfioUserRegionAccess(ulong Offset, uint Region, uint Count)
{
    internal const int Length = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserRegionAccess value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U64(b, 0), LittleEndian.U32(b, 8), LittleEndian.U32(b, 12)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, Offset);
        LittleEndian.U32(b, 8, Region);
        LittleEndian.U32(b, 12, Count);
    }
}

/// <summary>One entry of REGION_WRITE_MULTI (spec 3.7): <c>u64 offset, u32 region, u32 count (at most 8), 8 bytes data, left aligned</c>; before the entries and as the reply <c>u64 n</c>.</summary>
internal static class VfioUserWriteMulti
{
    internal const int HeadBytes = 8, EntryBytes = 24, MaxData = 8;

    internal static ulong ReadCount(ReadOnlySpan<byte> b) => b.Length >= HeadBytes ? LittleEndian.U64(b, 0) : 0;

    internal static void WriteCount(Span<byte> b, ulong n) => LittleEndian.U64(b, 0, n);

    /// <summary>The entry's place and its data; the data are empty when the count is over 8.</summary>
    internal static VfioUserRegionAccess ReadEntry(ReadOnlySpan<byte> entry, out ReadOnlySpan<byte> data)
    {
        VfioUserRegionAccess.TryRead(entry, out VfioUserRegionAccess access);
        data = access.Count <= MaxData ? entry.Slice(VfioUserRegionAccess.Length, (int)access.Count) : default;
        return access;
    }

    internal static void WriteEntry(Span<byte> entry, ulong offset, uint region, ReadOnlySpan<byte> data)
    {
        new VfioUserRegionAccess(offset, region, (uint)data.Length).Write(entry);
        entry.Slice(VfioUserRegionAccess.Length, MaxData).Clear();
        data.CopyTo(entry[VfioUserRegionAccess.Length..]);
    }
}

/// <summary>DMA_MAP request (spec 3.8): <c>u32 argsz 32, u32 flags, u64 file offset, u64 address, u64 size</c>, 0 or 1 fd; the reply is a bare header.</summary>
internal readonly record struct VfioUserDmaMap(uint ArgSz, uint Flags, ulong Offset, ulong Address, ulong Size)
{
    internal const int Length = 32;
    internal const uint FlagRead = 1, FlagWrite = 2, FlagMmapFd = 4, FlagFileIo = 8;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDmaMap value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4), LittleEndian.U64(b, 8), LittleEndian.U64(b, 16), LittleEndian.U64(b, 24)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
        LittleEndian.U64(b, 8, Offset);
        LittleEndian.U64(b, 16, Address);
        LittleEndian.U64(b, 24, Size);
    }
}

/// <summary>DMA_UNMAP (spec 3.9): <c>u32 argsz, u32 flags, u64 address, u64 size</c>, echoed; with flag 1 a <see cref="VfioUserBitmap"/> and, in the reply, the bitmap.</summary>
internal readonly record struct VfioUserDmaUnmap(uint ArgSz, uint Flags, ulong Address, ulong Size)
{
    internal const int Length = 24;
    internal const uint FlagGetDirty = 1, FlagAll = 2;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDmaUnmap value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4), LittleEndian.U64(b, 8), LittleEndian.U64(b, 16)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
        LittleEndian.U64(b, 8, Address);
        LittleEndian.U64(b, 16, Size);
    }
}

/// <summary>DMA_READ, DMA_WRITE, server to client (spec 3.10): <c>u64 address, u64 count</c>, then data in the write request and the read reply.</summary>
internal readonly record struct VfioUserDmaAccess(ulong Address, ulong Count)
{
    internal const int Length = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDmaAccess value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U64(b, 0), LittleEndian.U64(b, 8)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, Address);
        LittleEndian.U64(b, 8, Count);
    }
}

/// <summary>Little-endian fields by offset.</summary>
internal static class LittleEndian
{
    internal static uint U32(ReadOnlySpan<byte> b, int at) => BinaryPrimitives.ReadUInt32LittleEndian(b[at..]);

    internal static ulong U64(ReadOnlySpan<byte> b, int at) => BinaryPrimitives.ReadUInt64LittleEndian(b[at..]);

    internal static void U32(Span<byte> b, int at, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(b[at..], value);

    internal static void U64(Span<byte> b, int at, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(b[at..], value);
}
