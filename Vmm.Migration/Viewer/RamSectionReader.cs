using Vmm.Core.Channels;
using Vmm.Core.Wire;
using Vmm.Migration.Ram;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Reads the bodies of the <c>ram</c> section (stream 3, 5) with the engine's grammar, counts pages and reports what a receiver would refuse.
/// Positions of the stream are offsets in the file.
/// </summary>
internal sealed class RamSectionReader(QemuFileReader f, ISeekableChannel file, StreamDocument document, StreamViewOptions options,
    Action<StreamSeverity, long, string> report)
{
    private readonly byte[] _delta = new byte[WireLimits.XbzrleBytes];
    private readonly byte[] _scratch = new byte[document.PageSize];
    private readonly int _pageSize = document.PageSize;
    private readonly Dictionary<string, RamBlockSummary> _blocks = [];
    private readonly Dictionary<string, RamPageCounts> _counts = [];
    private readonly List<RamPageCounts> _inOrder = [];
    private List<RamPageRecord> _pages = [];
    private RamBlockSummary? _block;
    private int _pagesListed;
    private bool _sawList;

    /// <summary>What the setup record contains.</summary>
    internal RamBlockLayout Layout { get; set; }

    /// <summary>True if the list does not contain every page record.</summary>
    internal bool IsShortened => _pagesListed > WireLimits.ViewerPages;

    /// <summary>Reads one body up to and including EOS.</summary>
    internal void Read(StreamEntry entry)
    {
        _counts.Clear();
        _inOrder.Clear();
        _pages = [];
        while (ReadRecord(entry.Kind)) { }
        entry.Ram = [.. _inOrder];
        entry.Pages = _pages;
    }

    private bool ReadRecord(StreamEntryKind section)
    {
        long at = f.Position;
        RamRecord record = RamRecord.Read(f);
        switch (record.Kind)
        {
            case RamSaveFlags.Eos: return false;
            case RamSaveFlags.MultifdFlush: return true;
            case RamSaveFlags.MemSize:
                if (section != StreamEntryKind.Start) report(StreamSeverity.Violation, at, $"a block list in a {section.ToString().ToUpperInvariant()} section");
                if (_sawList) report(StreamSeverity.Violation, at, "a second block list");
                _sawList = true;
                ReadBlocks(record.Offset);
                return true;
        }
        if (Layout.IsMappedRam) throw f.Bad("RAM record in a mapped-ram file", "no page records", record.Kind.ToString(), at);
        RamBlockSummary block = Block(record, at);
        bool inside = block.UsedLength == 0 || (record.Offset < block.UsedLength && block.UsedLength - record.Offset >= (ulong)_pageSize);
        if (record.Offset % (ulong)_pageSize != 0 || !inside)
            report(StreamSeverity.Violation, at, $"page offset 0x{record.Offset:x} is outside RAM block '{block.Name}' of 0x{block.UsedLength:x} bytes or not a multiple of the page size");
        ReadPage(record, block, inside, at);
        Count(block, record.Kind);
        List(new RamPageRecord(block.Name, record.Offset, record.Kind, at));
        return true;
    }

    private void ReadPage(RamRecord record, RamBlockSummary block, bool inside, long at)
    {
        Span<byte> page = inside && options.Ram is { } sink ? sink.Page(block.Name, record.Offset, _pageSize) : default;
        if (page.Length != _pageSize) page = _scratch;
        switch (record.Kind)
        {
            case RamSaveFlags.Page:
                f.Read(page);
                break;
            case RamSaveFlags.Zero:
                byte fill = f.ReadByte();
                if (fill != 0) report(StreamSeverity.Violation, at, $"a zero page record that fills with 0x{fill:x2}; QEMU from 9.0 on refuses it");
                page.Fill(fill);
                break;
            default:
                Span<byte> delta = RamRecord.ReadXbzrle(f, _delta);
                if (!Xbzrle.TryDecode(delta, page)) report(StreamSeverity.Violation, at, $"the {delta.Length} bytes of an XBZRLE record do not decode into one page");
                break;
        }
    }

    /// <summary>Returns the record's block. Reports an unknown block once, and adds it with length 0.</summary>
    private RamBlockSummary Block(RamRecord record, long at)
    {
        if (record.IsContinue) return _block ?? throw f.Bad("RAM record", "a block name before the first CONTINUE", "CONTINUE", at);
        string name = f.ReadCountedString();
        if (_block?.Name == name) return _block;
        if (_blocks.TryGetValue(name, out RamBlockSummary? block)) return _block = block;
        if (_blocks.Count >= WireLimits.RamBlocks) throw f.Bad("RAM block", $"at most {WireLimits.RamBlocks} names", $"another, '{name}'", at);
        if (_sawList) report(StreamSeverity.Violation, at, $"RAM block '{name}' is not in the block list");
        return _block = AddBlock(new RamBlockSummary(name, 0));
    }

    private RamBlockSummary AddBlock(RamBlockSummary block)
    {
        _blocks.TryAdd(block.Name, block);
        document.BlockList.Add(block);
        options.Ram?.AddBlock(block.Name, block.UsedLength);
        return block;
    }

    private void ReadBlocks(ulong total)
    {
        var list = new RamBlockListReader(f, total, Layout);
        while (true)
        {
            long at = f.Position;
            if (!list.TryRead(out RamBlockEntry? entry)) return;
            if (_blocks.ContainsKey(entry!.Name)) report(StreamSeverity.Violation, at, $"RAM block '{entry.Name}' is listed twice");
            if (entry.UsedLength % (ulong)_pageSize != 0)
                report(StreamSeverity.Violation, at, $"RAM block '{entry.Name}': length 0x{entry.UsedLength:x} is not a multiple of the page size 0x{_pageSize:x}");
            RamBlockSummary block = AddBlock(new RamBlockSummary(entry.Name, entry.UsedLength)
            {
                PageSize = entry.PageSize, Address = entry.Address, BitmapOffset = entry.Mapped?.BitmapOffset, PagesOffset = entry.Mapped?.PagesOffset,
            });
            if (entry.Mapped is { } mapped) ReadMapped(block, mapped);
        }
    }

    /// <summary>Reads a block's bitmap and moves behind its pages (stream 5.1).</summary>
    private void ReadMapped(RamBlockSummary block, MappedRamHeader header)
    {
        long at = f.Position - MappedRamHeader.SizeBytes;
        if (header.IsIgnored) return;
        ulong length = (ulong)file.LengthBytes, pages = block.UsedLength / (ulong)_pageSize;
        ulong bitmapBytes = MappedRamHeader.BitmapBytes(pages);
        if (header.PageSize != (ulong)_pageSize) throw f.Bad($"mapped-ram page size of RAM block '{block.Name}'", _pageSize.ToString(), header.PageSize.ToString(), at);
        if (header.PagesOffset % (ulong)_pageSize != 0)
            report(StreamSeverity.Violation, at, $"RAM block '{block.Name}': pages start at 0x{header.PagesOffset:x}, which is not a multiple of the page size");
        if (header.PagesOffset > length || block.UsedLength > length - header.PagesOffset)
            throw f.Bad($"pages of RAM block '{block.Name}'", $"a range inside the file of 0x{length:x} bytes", $"0x{header.PagesOffset:x}+0x{block.UsedLength:x}", at);
        if (header.BitmapOffset < (ulong)f.Position || header.BitmapOffset > header.PagesOffset || bitmapBytes > header.PagesOffset - header.BitmapOffset)
            throw f.Bad($"bitmap of RAM block '{block.Name}'", $"a range between this header and its pages at 0x{header.PagesOffset:x}",
                $"0x{header.BitmapOffset:x}+0x{bitmapBytes:x}", at);
        ReadBitmap(block, header, pages, bitmapBytes);
        f.Seek((long)(header.PagesOffset + block.UsedLength));
    }

    private void ReadBitmap(RamBlockSummary block, MappedRamHeader header, ulong pages, ulong bitmapBytes)
    {
        Span<byte> chunk = stackalloc byte[4096];
        for (ulong done = 0; done < bitmapBytes; done += (ulong)chunk.Length)
        {
            Span<byte> part = chunk[..(int)Math.Min((ulong)chunk.Length, bitmapBytes - done)];
            file.ReadAt(part, (long)(header.BitmapOffset + done));
            for (int i = 0; i < part.Length; i++)
            {
                // The bitmap is of 64-bit words in host order: on x86 that equals bytes with the lowest bit first.
                for (int bits = part[i]; bits != 0; bits &= bits - 1)
                {
                    ulong page = ((done + (ulong)i) * 8) + (ulong)int.TrailingZeroCount(bits);
                    if (page >= pages)
                    {
                        report(StreamSeverity.Violation, (long)(header.BitmapOffset + done) + i, $"bitmap of RAM block '{block.Name}': bit {page} is past its {pages} pages");
                        return;
                    }
                    ReadMappedPage(block, header, page);
                }
            }
        }
    }

    private void ReadMappedPage(RamBlockSummary block, MappedRamHeader header, ulong page)
    {
        ulong offset = page * (ulong)_pageSize;
        long at = (long)(header.PagesOffset + offset);
        Count(block, RamSaveFlags.Page);
        List(new RamPageRecord(block.Name, offset, RamSaveFlags.Page, at));
        Span<byte> content = options.Ram is { } sink ? sink.Page(block.Name, offset, _pageSize) : default;
        if (content.Length == _pageSize) file.ReadAt(content, at);
    }

    private void Count(RamBlockSummary block, RamSaveFlags kind)
    {
        if (!_counts.TryGetValue(block.Name, out RamPageCounts? counts))
        {
            _counts[block.Name] = counts = new RamPageCounts(block.Name);
            _inOrder.Add(counts);
        }
        Add(counts, kind);
        Add(block.Pages, kind);
    }

    private static void Add(RamPageCounts counts, RamSaveFlags kind)
    {
        switch (kind)
        {
            case RamSaveFlags.Page: counts.Data++; break;
            case RamSaveFlags.Zero: counts.Zero++; break;
            default: counts.Xbzrle++; break;
        }
    }

    private void List(RamPageRecord page)
    {
        if (options.ListPages && ++_pagesListed <= WireLimits.ViewerPages) _pages.Add(page);
    }
}
