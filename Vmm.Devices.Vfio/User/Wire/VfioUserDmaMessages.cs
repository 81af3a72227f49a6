namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>
/// DMA_MAP request (vfio-user 3.8): <c>u32 argsz 32, u32 flags, u64 file offset, u64 address, u64 size</c>, 0 or 1 fd; the reply is a bare header.
/// </summary>
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

/// <summary>
/// DMA_UNMAP (vfio-user 3.9): <c>u32 argsz, u32 flags, u64 address, u64 size</c>, echoed; with flag 1 a <see cref="VfioUserBitmap"/> and, in the
/// reply, the bitmap.
/// </summary>
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

/// <summary>DMA_READ, DMA_WRITE, server to client (vfio-user 3.10): <c>u64 address, u64 count</c>, then data in the write request and the read reply.</summary>
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
