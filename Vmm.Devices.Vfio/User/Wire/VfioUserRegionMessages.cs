namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>REGION_READ, REGION_WRITE (vfio-user 3.6): <c>u64 offset, u32 region, u32 count</c>, then data in the write request and the read reply.</summary>
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

/// <summary>
/// One entry of REGION_WRITE_MULTI (vfio-user 3.7): <c>u64 offset, u32 region, u32 count (at most 8), 8 bytes data, left aligned</c>; before the
/// entries and as the reply <c>u64 n</c>.
/// </summary>
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
