using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>DEVICE_FEATURE head (vfio-user 4): <c>u32 argsz, u32 flags (bits 0-15 feature, 16 GET, 17 SET, 18 PROBE)</c>, then the feature's data.</summary>
internal readonly record struct VfioUserFeature(uint ArgSz, VfioDeviceFeature Feature, VfioFeatureOp Op)
{
    internal const int Length = 8;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserFeature value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), (VfioDeviceFeature)(ushort)LittleEndian.U32(b, 4), (VfioFeatureOp)(LittleEndian.U32(b, 4) & 0xffff0000)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, (uint)Feature | (uint)Op);
    }

    /// <summary>Body of the request for the migration flags.</summary>
    internal static byte[] GetMigration
    {
        get
        {
            byte[] body = new byte[Length];
            new VfioUserFeature(Length + sizeof(ulong), VfioDeviceFeature.Migration, VfioFeatureOp.Get).Write(body);
            return body;
        }
    }
}

/// <summary>Data of MIG_DEVICE_STATE: <c>u32 state, u32 data_fd</c>; vfio-user does not use the second, which is sent as all ones and echoed.</summary>
internal readonly record struct VfioUserStateData(VfioDeviceState State, uint DataFd)
{
    internal const int Length = 8;
    internal const uint NoFd = uint.MaxValue;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserStateData value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new((VfioDeviceState)LittleEndian.U32(b, 0), LittleEndian.U32(b, 4)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, (uint)State);
        LittleEndian.U32(b, 4, DataFd);
    }
}

/// <summary>Data of DMA_LOGGING_START: <c>u64 page_size, u32 num_ranges, u32 reserved</c>, then ranges of <c>u64 iova, u64 length</c>.</summary>
internal readonly record struct VfioUserLogStart(ulong PageSize, uint NumRanges)
{
    internal const int Length = 16, RangeBytes = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserLogStart value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U64(b, 0), LittleEndian.U32(b, 8)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, PageSize);
        LittleEndian.U32(b, 8, NumRanges);
        LittleEndian.U32(b, 12, 0);
    }
}

/// <summary>Data of DMA_LOGGING_REPORT: <c>u64 iova, u64 length, u64 page_size</c>, in the reply followed by the bitmap.</summary>
internal readonly record struct VfioUserLogReport(ulong Iova, ulong Size, ulong PageSize)
{
    internal const int Length = 24;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserLogReport value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U64(b, 0), LittleEndian.U64(b, 8), LittleEndian.U64(b, 16)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, Iova);
        LittleEndian.U64(b, 8, Size);
        LittleEndian.U64(b, 16, PageSize);
    }
}

/// <summary>
/// MIG_DATA_READ, MIG_DATA_WRITE (vfio-user 8.1): <c>u32 argsz (8 + size), u32 size</c>, then data in the read reply and the write request; a write's
/// reply is a bare header.
/// </summary>
internal readonly record struct VfioUserMigData(uint ArgSz, uint Size)
{
    internal const int Length = 8;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserMigData value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Size);
    }
}

/// <summary>
/// Head of DIRTY_PAGES (vfio-user 9, v1 era): <c>u32 argsz, u32 flags (1 start, 2 stop, 4 get)</c>; start and stop are answered with a bare header.
/// </summary>
internal readonly record struct VfioUserDirtyPages(uint ArgSz, uint Flags)
{
    internal const int Length = 8;
    internal const uint Start = 1, Stop = 2, Get = 4;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDirtyPages value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U32(b, 0), LittleEndian.U32(b, 4)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U32(b, 0, ArgSz);
        LittleEndian.U32(b, 4, Flags);
    }
}

/// <summary>Rest of a DIRTY_PAGES get: <c>u64 iova, u64 size, u64 pgsize, u64 bitmap_bytes</c>, in the reply followed by the bitmap.</summary>
internal readonly record struct VfioUserDirtyRange(ulong Iova, ulong Size, VfioUserBitmap Bitmap)
{
    internal const int Length = 32;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserDirtyRange value)
    {
        value = default;
        if (b.Length < Length || !VfioUserBitmap.TryRead(b[16..], out VfioUserBitmap bitmap)) return false;
        value = new(LittleEndian.U64(b, 0), LittleEndian.U64(b, 8), bitmap);
        return true;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, Iova);
        LittleEndian.U64(b, 8, Size);
        Bitmap.Write(b[16..]);
    }
}

/// <summary>What a dirty bitmap looks like: <c>u64 pgsize, u64 bytes</c>.</summary>
internal readonly record struct VfioUserBitmap(ulong PageSize, ulong Bytes)
{
    internal const int Length = 16;

    internal static bool TryRead(ReadOnlySpan<byte> b, out VfioUserBitmap value)
    {
        bool ok = b.Length >= Length;
        value = ok ? new(LittleEndian.U64(b, 0), LittleEndian.U64(b, 8)) : default;
        return ok;
    }

    internal void Write(Span<byte> b)
    {
        LittleEndian.U64(b, 0, PageSize);
        LittleEndian.U64(b, 8, Bytes);
    }

    /// <summary>Bytes of a bitmap: one bit a page, rounded up to whole u64s (vfio-user 4).</summary>
    /// <param name="lengthBytes">Of the range.</param>
    /// <param name="pageSizeBytes">A power of two.</param>
    internal static ulong BytesFor(ulong lengthBytes, ulong pageSizeBytes)
    {
        ulong pages = (lengthBytes / pageSizeBytes) + (lengthBytes % pageSizeBytes == 0 ? 0UL : 1);
        return ((pages / 64) + (pages % 64 == 0 ? 0UL : 1)) * 8;
    }

    /// <summary>Adds the first bits of a wire bitmap to words, LSB first; padding bits of the wire are ignored.</summary>
    /// <param name="wire">Bitmap as received, at least <paramref name="bits"/> long.</param>
    /// <param name="bits">How many.</param>
    /// <param name="into">Words that get the bits.</param>
    /// <param name="firstBit">Where the first bit goes.</param>
    internal static void OrInto(ReadOnlySpan<byte> wire, ulong bits, Span<ulong> into, ulong firstBit)
    {
        int shift = (int)(firstBit & 63);
        for (ulong done = 0; done < bits; done += 64)
        {
            ulong word = LittleEndian.U64(wire, (int)(done / 8));
            ulong left = bits - done;
            if (left < 64) word &= (1UL << (int)left) - 1;
            if (word == 0) continue;
            int at = (int)((firstBit + done) / 64);
            into[at] |= word << shift;
            if (shift != 0 && word >> (64 - shift) != 0) into[at + 1] |= word >> (64 - shift);
        }
    }
}
