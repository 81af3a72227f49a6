using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>DEVICE_GET_INFO (vfio-user 3.1): <c>u32 argsz, u32 flags (1 reset, 2 PCI), u32 num_regions, u32 num_irqs</c>, both ways.</summary>
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
/// DEVICE_GET_REGION_INFO (vfio-user 3.2): <c>u32 argsz, u32 flags (1 r, 2 w, 4 mmap, 8 caps), u32 index, u32 cap_offset, u64 size, u64 offset</c>, both ways.
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

/// <summary>DEVICE_GET_REGION_IO_FDS (vfio-user 3.3): <c>u32 argsz, u32 flags, u32 index, u32 count</c>, then entries in the reply.</summary>
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

/// <summary>DEVICE_GET_IRQ_INFO (vfio-user 3.4): <c>u32 argsz, u32 flags, u32 index, u32 count</c>, both ways.</summary>
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

/// <summary>
/// DEVICE_SET_IRQS request (vfio-user 3.5): <c>u32 argsz (20, or 20 + bools), u32 flags, u32 index, u32 start, u32 count</c>, then bools; the reply
/// is a bare header.
/// </summary>
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
