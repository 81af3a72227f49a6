using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>Loading side of the <c>ram</c> section (spec 3, receiver rules; QEMU: <c>ram_load_precopy</c>).</summary>
internal sealed partial class RamMigration
{
    private readonly Dictionary<RamBlock, DirtyBitmap> _knownZero = [];
    private readonly ReceivedPages _received = new();
    private RamBlock? _loadBlock;
    private DirtyBitmap? _loadReceived;
    private long _loadedPages;

    /// <summary>Parse and check everything but leave memory alone; for the rehearsal of a snapshot load.</summary>
    internal bool ValidateOnly { get; set; }

    /// <summary>Capability x-ignore-shared: the block list carries addresses.</summary>
    internal bool ExpectsAddresses { get; set; }

    /// <summary>Which of the listed blocks come without pages.</summary>
    internal IgnoredRam IgnoredOnLoad { get; set; }

    /// <summary>Call before a load is confirmed and before its cleanup.</summary>
    /// <exception cref="IncompatibleStateException">A page of a listed block never came.</exception>
    internal void ThrowIfPagesMissing() => _received.ThrowIfMissing();

    internal long LoadedPages => Volatile.Read(ref _loadedPages);

    public void LoadSetup(QemuFileReader f)
    {
        _loadBlock = null;
        _loadedPages = 0;
        _knownZero.Clear();
        _received.Begin(memory.Blocks);
        // Fresh memory is zero already: a zero page that was not written in this load is skipped, so that it is not even touched.
        foreach (RamBlock block in memory.Blocks)
            if (block.IsKnownZero) _knownZero[block] = new DirtyBitmap(block.PageCount);
    }

    public void LoadState(QemuFileReader f, int versionId)
    {
        while (true)
        {
            RamRecord record = RamRecord.Read(f);
            switch (record.Kind)
            {
                case RamSaveFlags.Page: LoadPage(f, record); break;
                case RamSaveFlags.Zero: LoadZero(f, record); break;
                case RamSaveFlags.Xbzrle: LoadXbzrle(f, record); break;
                case RamSaveFlags.MemSize: LoadBlockList(f, record.Offset); break;
                case RamSaveFlags.Eos:
                    Marks?.OnEndOfSection();
                    return;
                default:
                    // MULTIFD_FLUSH. Without multifd it says nothing: QEMU 8.0 sends it even then.
                    Marks?.OnFlush();
                    break;
            }
        }
    }

    public void LoadCleanup()
    {
        _knownZero.Clear();
        _received.End();
        _loadBlock = null;
        _loadReceived = null;
    }

    private void LoadPage(QemuFileReader f, in RamRecord record)
    {
        RamBlock block = Block(f, record);
        ulong offset = record.Offset;
        if (ValidateOnly)
        {
            f.Skip(PageSize);
        }
        else
        {
            f.ReadGuest(block, offset, PageSize);
            if (_knownZero.Count > 0 && _knownZero.TryGetValue(block, out DirtyBitmap? written)) written.Set((long)(offset / PageSize));
        }
        Interlocked.Increment(ref _loadedPages);
    }

    private void LoadZero(QemuFileReader f, in RamRecord record)
    {
        RamBlock block = Block(f, record);
        ulong offset = record.Offset;
        byte fill = f.ReadByte(); // 7.2 fills with any byte, 11.1 insists on 0 (spec 3).
        Interlocked.Increment(ref _loadedPages);
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

    private RamBlock Block(QemuFileReader f, in RamRecord record)
    {
        if (!record.IsContinue)
        {
            string name = f.ReadCountedString();
            // Names repeat for long stretches; look up only when the name changes.
            if (_loadBlock?.Name != name)
            {
                _loadBlock = memory.FindBlock(name) ?? throw f.Bad("RAM block", $"one of {BlockNames()}", $"'{name}'");
                _loadReceived = _received.Of(_loadBlock);
            }
        }
        RamBlock block = _loadBlock ?? throw f.Bad("RAM record", "a block name before CONTINUE", "CONTINUE");
        if (record.Offset >= block.SizeBytes) throw f.Bad($"page offset in RAM block '{block.Name}'", $"below 0x{block.SizeBytes:x}", $"0x{record.Offset:x}");
        // Noted before its content is read: a stream that ends in between fails for that.
        _loadReceived?.Set((long)(record.Offset / PageSize));
        return block;
    }

    private void LoadBlockList(QemuFileReader f, ulong total)
    {
        var list = new RamBlockListReader(f, total, new RamBlockLayout(HasAddress: ExpectsAddresses));
        while (list.TryRead(out RamBlockEntry? entry))
        {
            (string name, ulong length) = (entry!.Name, entry.UsedLength);
            RamBlock? block = memory.FindBlock(name);
            if (block is null)
                throw Mismatch(f, $"RAM block '{name}' of 0x{length:x} bytes does not exist here", BlockNames(), $"'{name}'");
            if (block.SizeBytes != length)
                throw Mismatch(f, $"RAM block '{name}': size differs, 0x{block.SizeBytes:x} here, 0x{length:x} in the stream", $"0x{block.SizeBytes:x}", $"0x{length:x}");
            if (entry.Address is { } address && block.FilePath is not null && address != block.Address.Value)
                throw Mismatch(f, $"RAM block '{name}': address differs, {block.Address} here, 0x{address:x} in the stream", $"{block.Address}", $"0x{address:x}");
            if (!IsIgnored(block, IgnoredOnLoad)) _received.Expect(block);
        }
    }

    private IncompatibleStateException Mismatch(QemuFileReader f, string message, string expected, string found) => new(message)
    {
        Section = f.Section, Offset = f.Position, Expected = expected, Found = found,
        Hint = $"give both sides the same --memory; here: {string.Join(", ", memory.Blocks.Select(static b => $"{b.Name}={b.SizeBytes >> 20}M"))}",
    };

    private string BlockNames() => memory.Blocks.Count == 0 ? "no blocks" : string.Join(", ", memory.Blocks.Select(static b => $"'{b.Name}'"));

    /// <summary>Delta record: u8 1, u16 n, n bytes of runs (spec 3.4).</summary>
    private void LoadXbzrle(QemuFileReader f, in RamRecord record)
    {
        RamBlock block = Block(f, record);
        ulong offset = record.Offset;
        Span<byte> delta = RamRecord.ReadXbzrle(f, stackalloc byte[WireLimits.XbzrleBytes]);
        Span<byte> page = ValidateOnly ? new byte[PageSize] : block.Slice(offset, PageSize);
        if (!Xbzrle.TryDecode(delta, page)) throw f.Bad("XBZRLE runs", "runs inside one page", $"{delta.Length} bytes that do not decode");
        if (_knownZero.TryGetValue(block, out DirtyBitmap? written)) written.Set((long)(offset / PageSize));
        Interlocked.Increment(ref _loadedPages);
    }
}
