using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>
/// One attempt to load guest RAM (stream 3; QEMU: <c>ram_load_precopy</c>). The stream's records come on one thread, pages from data channels on any.
/// </summary>
internal sealed class RamLoad : ILoadState, ILoadPages
{
    private const int PageSize = RamBlock.PageSize;

    private readonly GuestMemory _memory;
    private readonly LoadContext _context;
    private readonly Dictionary<string, RamBlockLoad> _blocks = [];
    private readonly ReceivedPages _received;
    private readonly SyncMarks? _marks;
    private readonly bool _isMapped;
    private RamBlockLoad? _current;

    internal RamLoad(GuestMemory memory, LoadContext context)
    {
        (_memory, _context) = (memory, context);
        _received = new ReceivedPages(memory.Blocks);
        _isMapped = context.Capabilities.IsOn(MigrationCapability.MappedRam);
        _marks = context.SyncDataChannels is { } wait ? new SyncMarks(wait) : null;
        foreach (RamBlock block in memory.Blocks) _blocks[block.Name] = new RamBlockLoad(block, _received.Of(block), isZero: ValidateOnly || block.IsKnownZero);
    }

    /// <summary>True when the source marks SYNCs with MULTIFD_FLUSH; false without data channels.</summary>
    internal bool UsesFlush => _marks is { UsesFlush: true };

    private bool ValidateOnly => _context.ValidateOnly;

    public ILoadBlock? FindBlock(string name) => _blocks.GetValueOrDefault(name);

    bool ILoadState.NeedsNoEnd => true;

    public void ThrowIfIncomplete() => _received.ThrowIfMissing(IgnoredRamRule.Of(_context.Mode, _context.Capabilities) == IgnoredRam.SharedFiles);

    public void LoadState(QemuFileReader f, int versionId)
    {
        while (true)
        {
            RamRecord record = RamRecord.Read(f);
            if (_isMapped && record.Kind is not (RamSaveFlags.MemSize or RamSaveFlags.Eos)) throw f.Bad("RAM record in a mapped-ram file", "no page records", $"{record.Kind}");
            switch (record.Kind)
            {
                case RamSaveFlags.Page: LoadPage(f, record); break;
                case RamSaveFlags.Zero: LoadZero(f, record); break;
                case RamSaveFlags.Xbzrle: LoadXbzrle(f, record); break;
                case RamSaveFlags.MemSize: LoadBlockList(f, record.Offset); break;
                case RamSaveFlags.Eos:
                    _marks?.OnEndOfSection();
                    return;
                default:
                    // MULTIFD_FLUSH. It means nothing without multifd; QEMU 8.0 sends it even then.
                    _marks?.OnFlush();
                    break;
            }
        }
    }

    private void LoadPage(QemuFileReader f, in RamRecord record)
    {
        RamBlockLoad block = Block(f, record);
        if (ValidateOnly)
        {
            f.Skip(PageSize);
            return;
        }
        f.ReadGuest(block.Block, record.Offset, PageSize);
        block.NoteWritten(record.Offset);
    }

    private void LoadZero(QemuFileReader f, in RamRecord record)
    {
        RamBlockLoad block = Block(f, record);
        byte fill = f.ReadByte(); // QEMU 7.2 accepts any byte, 11.1 only 0 (stream 3).
        if (ValidateOnly) return;
        if (fill == 0)
        {
            block.Clear(record.Offset);
            return;
        }
        block.Block.Slice(record.Offset, PageSize).Fill(fill);
        block.NoteWritten(record.Offset);
    }

    private RamBlockLoad Block(QemuFileReader f, in RamRecord record)
    {
        if (!record.IsContinue)
        {
            string name = f.ReadCountedString();
            // Many records in a row name the same block, so the block is looked up only when the name changes.
            if (_current?.Block.Name != name) _current = _blocks.GetValueOrDefault(name) ?? throw f.Bad("RAM block", $"one of {BlockNames()}", $"'{name}'");
        }
        RamBlockLoad current = _current ?? throw f.Bad("RAM record", "a block name before CONTINUE", "CONTINUE");
        if (record.Offset >= current.Block.SizeBytes) throw f.Bad($"page offset in RAM block '{current.Block.Name}'", $"below 0x{current.Block.SizeBytes:x}", $"0x{record.Offset:x}");
        // Noted before its content is read: if the stream ends in between, the load fails anyway.
        current.NoteReceived(record.Offset);
        return current;
    }

    private void LoadBlockList(QemuFileReader f, ulong total)
    {
        IgnoredRam ignored = IgnoredRamRule.Of(_context.Mode, _context.Capabilities);
        var list = new RamBlockListReader(f, total, new RamBlockLayout(HasAddress: _context.Capabilities.IsOn(MigrationCapability.XIgnoreShared), IsMappedRam: _isMapped));
        while (list.TryRead(out RamBlockEntry? entry))
        {
            (string name, ulong length) = (entry!.Name, entry.UsedLength);
            RamBlock? block = _memory.FindBlock(name);
            if (block is null)
                throw Mismatch(f, $"RAM block '{name}' of 0x{length:x} bytes does not exist here", BlockNames(), $"'{name}'");
            if (block.SizeBytes != length)
                throw Mismatch(f, $"RAM block '{name}': size differs, 0x{block.SizeBytes:x} here, 0x{length:x} in the stream", $"0x{block.SizeBytes:x}", $"0x{length:x}");
            if (entry.Address is { } address && block.FilePath is not null && address != block.Address.Value)
                throw Mismatch(f, $"RAM block '{name}': address differs, {block.Address} here, 0x{address:x} in the stream", $"{block.Address}", $"0x{address:x}");
            if (ignored == IgnoredRam.SharedFiles && block.FilePath is not null) _received.ExpectInFile(block);
            else if (!ignored.Covers(block)) _received.Expect(block);
            if (entry.Mapped is not { IsIgnored: false } mapped) continue;
            MappedRamLoad.Load(f, ValidateOnly ? null : block, entry, mapped, _blocks[name].MayHaveMemory);
            _received.Of(block).SetRange(0, block.PageCount);
        }
    }

    private IncompatibleStateException Mismatch(QemuFileReader f, string message, string expected, string found) => new(message)
    {
        Section = f.Section, Offset = f.Position, Expected = expected, Found = found,
        Hint = $"give both sides the same --memory; here: {string.Join(", ", _memory.Blocks.Select(static b => $"{b.Name}={b.SizeBytes >> 20}M"))}",
    };

    private string BlockNames() => _memory.Blocks.Count == 0 ? "no blocks" : string.Join(", ", _memory.Blocks.Select(static b => $"'{b.Name}'"));

    /// <summary>Delta record: u8 1, u16 n, n bytes of runs (stream 3.4).</summary>
    private void LoadXbzrle(QemuFileReader f, in RamRecord record)
    {
        RamBlockLoad block = Block(f, record);
        ulong offset = record.Offset;
        Span<byte> delta = RamRecord.ReadXbzrle(f, stackalloc byte[WireLimits.XbzrleBytes]);
        Span<byte> page = ValidateOnly ? new byte[PageSize] : block.Block.Slice(offset, PageSize);
        if (!Xbzrle.TryDecode(delta, page)) throw f.Bad("XBZRLE runs", "runs inside one page", $"{delta.Length} bytes that do not decode");
        if (!ValidateOnly) block.NoteWritten(offset);
    }
}
