using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>Loading side of the <c>ram</c> section (spec 3, receiver rules; QEMU: <c>ram_load_precopy</c>).</summary>
internal sealed partial class RamMigration
{
    private readonly Dictionary<RamBlock, DirtyBitmap> _knownZero = [];
    private RamBlock? _loadBlock;
    private long _loadedPages;

    /// <summary>Parse and check everything but leave memory alone; for the rehearsal of a snapshot load.</summary>
    internal bool ValidateOnly { get; set; }

    internal long LoadedPages => Volatile.Read(ref _loadedPages);

    public void LoadSetup(QemuFileReader f)
    {
        _loadBlock = null;
        _loadedPages = 0;
        _knownZero.Clear();
        // Fresh memory is zero already: a zero page that was not written in this load is skipped, so that it is not even touched.
        foreach (RamBlock block in memory.Blocks)
            if (block.IsKnownZero) _knownZero[block] = new DirtyBitmap(block.PageCount);
    }

    public void LoadState(QemuFileReader f, int versionId)
    {
        while (true)
        {
            ulong record = f.ReadUInt64();
            var flags = (RamSaveFlags)(record & RamConstants.FlagMask);
            ulong offset = record & ~RamConstants.FlagMask;
            switch (flags & ~RamSaveFlags.Continue)
            {
                case RamSaveFlags.Page:
                    LoadPage(f, flags, offset);
                    break;
                case RamSaveFlags.Zero:
                    LoadZero(f, flags, offset);
                    break;
                case RamSaveFlags.Xbzrle:
                    LoadXbzrle(f, flags, offset);
                    break;
                case RamSaveFlags.Eos when flags == RamSaveFlags.Eos:
                    return;
                case RamSaveFlags.MemSize when flags == RamSaveFlags.MemSize:
                    LoadBlockList(f, offset);
                    break;
                case RamSaveFlags.MultifdFlush when flags == RamSaveFlags.MultifdFlush:
                    break; // Harmless without multifd, as in QEMU 11.1 (spec 3).
                default:
                    throw f.Bad("RAM record flags", "one of ZERO, PAGE, XBZRLE, MEM_SIZE, EOS", $"0x{(uint)flags:x3}");
            }
        }
    }

    public void LoadCleanup()
    {
        _knownZero.Clear();
        _loadBlock = null;
    }

    private void LoadPage(QemuFileReader f, RamSaveFlags flags, ulong offset)
    {
        RamBlock block = Block(f, flags, offset);
        if (ValidateOnly)
        {
            f.Skip(PageSize);
        }
        else
        {
            f.ReadGuest(block, offset, PageSize);
            if (_knownZero.Count > 0 && _knownZero.TryGetValue(block, out DirtyBitmap? written)) written.Set((long)(offset / PageSize));
        }
        _loadedPages++;
    }

    private void LoadZero(QemuFileReader f, RamSaveFlags flags, ulong offset)
    {
        RamBlock block = Block(f, flags, offset);
        byte fill = f.ReadByte(); // 7.2 fills with any byte, 11.1 insists on 0 (spec 3).
        _loadedPages++;
        if (ValidateOnly) return;
        long page = (long)(offset / PageSize);
        if (fill == 0)
        {
            if (_knownZero.TryGetValue(block, out DirtyBitmap? written) && !written.IsSet(page)) return;
            if (!block.IsZeroPage(page)) block.Slice(offset, PageSize).Clear();
            return;
        }
        block.Slice(offset, PageSize).Fill(fill);
        if (_knownZero.TryGetValue(block, out DirtyBitmap? marks)) marks.Set(page);
    }

    private RamBlock Block(QemuFileReader f, RamSaveFlags flags, ulong offset)
    {
        if ((flags & RamSaveFlags.Continue) == 0)
        {
            string name = f.ReadCountedString();
            // Names repeat for long stretches; look up only when the name changes.
            if (_loadBlock?.Name != name)
                _loadBlock = memory.FindBlock(name) ?? throw f.Bad("RAM block", $"one of {BlockNames()}", $"'{name}'");
        }
        RamBlock block = _loadBlock ?? throw f.Bad("RAM record", "a block name before CONTINUE", "CONTINUE");
        if (offset >= block.SizeBytes) throw f.Bad($"page offset in RAM block '{block.Name}'", $"below 0x{block.SizeBytes:x}", $"0x{offset:x}");
        return block;
    }

    private void LoadBlockList(QemuFileReader f, ulong total)
    {
        int count = 0;
        while (total > 0)
        {
            if (++count > WireLimits.RamBlocks) throw new StreamLimitException($"section '{f.Section}', offset {f.Position}: more than {WireLimits.RamBlocks} RAM blocks (WireLimits.RamBlocks)");
            string name = f.ReadCountedString();
            ulong length = f.ReadUInt64();
            RamBlock? block = memory.FindBlock(name);
            if (block is null)
                throw Mismatch(f, $"RAM block '{name}' of 0x{length:x} bytes does not exist here", BlockNames(), $"'{name}'");
            if (block.SizeBytes != length)
                throw Mismatch(f, $"RAM block '{name}': size differs, 0x{block.SizeBytes:x} here, 0x{length:x} in the stream", $"0x{block.SizeBytes:x}", $"0x{length:x}");
            if (length > total) throw f.Bad($"length of RAM block '{name}'", $"at most the 0x{total:x} bytes left of the total", $"0x{length:x}");
            total -= length;
        }
    }

    private IncompatibleStateException Mismatch(QemuFileReader f, string message, string expected, string found) => new(message)
    {
        Section = f.Section, Offset = f.Position, Expected = expected, Found = found,
        Hint = $"give both sides the same --memory; here: {string.Join(", ", memory.Blocks.Select(static b => $"{b.Name}={b.SizeBytes >> 20}M"))}",
    };

    private string BlockNames() => memory.Blocks.Count == 0 ? "no blocks" : string.Join(", ", memory.Blocks.Select(static b => $"'{b.Name}'"));

    /// <summary>Delta record: u8 1, u16 n, n bytes of runs (spec 3.4).</summary>
    private void LoadXbzrle(QemuFileReader f, RamSaveFlags flags, ulong offset)
    {
        RamBlock block = Block(f, flags, offset);
        byte encoding = f.ReadByte();
        if (encoding != RamConstants.XbzrleEncoding) throw f.Bad("XBZRLE encoding", "1", encoding.ToString());
        int length = f.ReadUInt16();
        if (length is 0 or > WireLimits.XbzrleBytes) throw f.Bad("XBZRLE length", $"1 to {WireLimits.XbzrleBytes}", length.ToString());
        Span<byte> delta = stackalloc byte[WireLimits.XbzrleBytes];
        delta = delta[..length];
        f.Read(delta);
        Span<byte> page = ValidateOnly ? new byte[PageSize] : block.Slice(offset, PageSize);
        if (!Xbzrle.TryDecode(delta, page)) throw f.Bad("XBZRLE runs", "runs inside one page", $"{length} bytes that do not decode");
        if (_knownZero.TryGetValue(block, out DirtyBitmap? written)) written.Set((long)(offset / PageSize));
        _loadedPages++;
    }
}
