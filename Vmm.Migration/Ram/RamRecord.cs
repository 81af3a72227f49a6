using Vmm.Core.Errors;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>
/// A record of the <c>ram</c> section, as the engine and the stream viewer read it (stream 3): u64 offset|flags, then cs block name unless CONTINUE is set,
/// then the payload of the kind.
/// </summary>
/// <param name="Kind">The flag that gives the record's kind.</param>
/// <param name="IsContinue">Same block as the record before; no name follows.</param>
/// <param name="Offset">Offset in the block; the total for MEM_SIZE.</param>
internal readonly record struct RamRecord(RamSaveFlags Kind, bool IsContinue, ulong Offset)
{
    /// <summary>Reads the first word.</summary>
    /// <exception cref="StreamFormatException">The combination of flags has no meaning.</exception>
    internal static RamRecord Read(QemuFileReader f)
    {
        ulong word = f.ReadUInt64();
        var flags = (RamSaveFlags)(word & RamConstants.FlagMask);
        ulong offset = word & ~RamConstants.FlagMask;
        RamSaveFlags kind = flags & ~RamSaveFlags.Continue;
        bool known = kind switch
        {
            RamSaveFlags.Page or RamSaveFlags.Zero or RamSaveFlags.Xbzrle => true,
            RamSaveFlags.MemSize => flags == kind,
            RamSaveFlags.Eos or RamSaveFlags.MultifdFlush => flags == kind && offset == 0,
            _ => false,
        };
        if (!known) throw f.Bad("RAM record", "one of ZERO, PAGE, XBZRLE, MEM_SIZE, EOS", $"flags 0x{(uint)flags:x3} with offset 0x{offset:x}", f.Position - 8);
        return new RamRecord(kind, kind != flags, offset);
    }

    /// <summary>Reads the payload of an XBZRLE record: u8 1, u16 n, n bytes of runs (stream 3.4).</summary>
    /// <param name="f">The stream.</param>
    /// <param name="buffer">At least <see cref="WireLimits.XbzrleBytes"/>.</param>
    /// <returns>The runs, in the buffer.</returns>
    /// <exception cref="StreamFormatException">Another encoding, or a length out of range.</exception>
    internal static Span<byte> ReadXbzrle(QemuFileReader f, Span<byte> buffer)
    {
        byte encoding = f.ReadByte();
        if (encoding != RamConstants.XbzrleEncoding) throw f.Bad("XBZRLE encoding", "1", encoding.ToString(), f.Position - 1);
        int length = f.ReadUInt16();
        if (length is 0 or > WireLimits.XbzrleBytes) throw f.Bad("XBZRLE length", $"1 to {WireLimits.XbzrleBytes}", length.ToString(), f.Position - 2);
        f.Read(buffer[..length]);
        return buffer[..length];
    }
}

/// <summary>The optional fields that a setup record has for each block; they depend on what came before it (stream 3.2).</summary>
/// <param name="PageSizeSummary">The page sizes in use, from POSTCOPY_ADVISE; 0 without it.</param>
/// <param name="HasAddress">Capability x-ignore-shared.</param>
/// <param name="IsMappedRam">Capability mapped-ram.</param>
internal readonly record struct RamBlockLayout(ulong PageSizeSummary = 0, bool HasAddress = false, bool IsMappedRam = false);

/// <summary>The header of a block in a mapped-ram file (stream 5.1).</summary>
/// <param name="PageSize">Bytes of a page.</param>
/// <param name="BitmapOffset">File offset of the bitmap; 0 for an ignored block.</param>
/// <param name="PagesOffset">File offset of page 0; 0 for an ignored block.</param>
internal readonly record struct MappedRamHeader(ulong PageSize, ulong BitmapOffset, ulong PagesOffset)
{
    /// <summary>u32 version 1, u64 page size, u64 bitmap offset, u64 pages offset.</summary>
    internal const int SizeBytes = 28;

    /// <summary>Version of the header.</summary>
    internal const uint Version = 1;

    /// <summary>True when the block has no pages in the file.</summary>
    internal bool IsIgnored => BitmapOffset == 0 && PagesOffset == 0;

    /// <summary>Bytes of a bitmap, which has whole 64-bit words.</summary>
    internal static ulong BitmapBytes(ulong pages) => (pages + 63) / 64 * 8;
}

/// <summary>One block of a setup record.</summary>
/// <param name="Name">Block name.</param>
/// <param name="UsedLength">Bytes.</param>
/// <param name="PageSize">The block's page size when it is not the usual one.</param>
/// <param name="Address">Guest-physical address, with x-ignore-shared.</param>
/// <param name="Mapped">The mapped-ram header; null without that capability.</param>
internal sealed record RamBlockEntry(string Name, ulong UsedLength, ulong? PageSize, ulong? Address, MappedRamHeader? Mapped);

/// <summary>
/// Reads the block list of a setup record (stream 3.2): per block cs name, u64 length, [u64 page size], [u64 address], [mapped-ram header],
/// until the lengths add up to the total.
/// </summary>
/// <param name="f">The stream.</param>
/// <param name="total">Sum of all lengths, from the record's first word.</param>
/// <param name="layout">The optional fields of each block.</param>
internal sealed class RamBlockListReader(QemuFileReader f, ulong total, RamBlockLayout layout)
{
    private int _count;

    /// <summary>Bytes of the total that no block has accounted for yet.</summary>
    internal ulong Left { get; private set; } = total;

    /// <summary>Reads the next block. With mapped-ram the stream then stands at the bitmap.</summary>
    /// <returns>False at the end of the list.</returns>
    /// <exception cref="StreamLimitException">Too many blocks.</exception>
    /// <exception cref="StreamFormatException">A length does not fit the total, or the mapped-ram header is of another version.</exception>
    internal bool TryRead(out RamBlockEntry? block)
    {
        block = null;
        if (Left == 0) return false;
        if (++_count > WireLimits.RamBlocks)
            throw f.Over($"RAM block number {_count}", WireLimits.RamBlocks, nameof(WireLimits.RamBlocks));
        long at = f.Position;
        string name = f.ReadCountedString();
        if (name.Length == 0) throw f.Bad("RAM block name", "1 to 255 bytes", "an empty one", at);
        ulong length = f.ReadUInt64();
        if (length == 0 || length > Left) throw f.Bad($"length of RAM block '{name}'", $"1 to the 0x{Left:x} bytes left of the total", $"0x{length:x}", f.Position - 8);
        Left -= length;
        ulong? pageSize = ReadPageSize();
        ulong? address = layout.HasAddress ? f.ReadUInt64() : null;
        block = new RamBlockEntry(name, length, pageSize, address, layout.IsMappedRam ? ReadMapped(name) : null);
        return true;
    }

    /// <summary>
    /// Reads the page size, which only blocks of huge pages have. A power of two over 4096 that the summary contains must be one: no name and no record can have
    /// that value here.
    /// </summary>
    private ulong? ReadPageSize()
    {
        if (layout.PageSizeSummary <= 4096) return null;
        ReadOnlySpan<byte> next = f.Peek(8);
        if (next.Length < 8) return null;
        ulong value = System.Buffers.Binary.BinaryPrimitives.ReadUInt64BigEndian(next);
        if (value <= 4096 || !ulong.IsPow2(value) || (value & layout.PageSizeSummary) == 0) return null;
        return f.ReadUInt64();
    }

    private MappedRamHeader ReadMapped(string name)
    {
        uint version = f.ReadUInt32();
        if (version != MappedRamHeader.Version) throw f.Bad($"mapped-ram header version of RAM block '{name}'", "1", version.ToString(), f.Position - 4);
        return new MappedRamHeader(f.ReadUInt64(), f.ReadUInt64(), f.ReadUInt64());
    }
}
