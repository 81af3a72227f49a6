using System.Buffers.Binary;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>How a page is sent.</summary>
internal enum XbzrleStep
{
    /// <summary>As without XBZRLE.</summary>
    AsUsual,
    /// <summary>Not at all: the destination has it.</summary>
    Nothing,
    /// <summary>As the delta that <see cref="XbzrleSave.Write"/> writes.</summary>
    Delta,
    /// <summary>As a page whose bytes <see cref="XbzrleSave.Write"/> writes.</summary>
    Copy,
}

/// <summary>
/// Sends pages as deltas from the copies that were sent before (stream 3.4; QEMU: <c>save_xbzrle_page</c>). The guest writes its pages meanwhile, so what is
/// sent is always a copy, the same as the one that the cache then holds. One thread.
/// </summary>
internal sealed class XbzrleSave : IDisposable
{
    private const int PageSize = RamBlock.PageSize, HeaderBytes = 3;

    private readonly XbzrleCache _cache;
    private readonly XbzrleFigures _figures;
    private readonly (RamBlock Block, long FirstPage)[] _blocks;
    private readonly byte[] _page = new byte[PageSize], _delta = new byte[HeaderBytes + WireLimits.XbzrleBytes];
    private int _block, _deltaBytes;
    private bool _isCopy, _started, _isLastStage;

    /// <param name="blocks">The blocks whose pages are sent.</param>
    /// <param name="figures">The figures to keep.</param>
    internal XbzrleSave(IEnumerable<RamBlock> blocks, XbzrleFigures figures)
    {
        _figures = figures;
        long pages = 0;
        var places = new List<(RamBlock, long)>();
        foreach (RamBlock block in blocks)
        {
            places.Add((block, pages));
            pages += block.PageCount;
        }
        _blocks = [.. places];
        _cache = new XbzrleCache(figures.CacheSizeBytes, pages);
    }

    /// <summary>The figures of an attempt; null when it sends no deltas.</summary>
    internal static XbzrleFigures? FiguresFor(SaveContext context) =>
        context.Capabilities.IsOn(MigrationCapability.Xbzrle) ? new XbzrleFigures(context.Parameters.XbzrleCacheSizeBytes) : null;

    /// <summary>Makes the encoder of an attempt; null when it sends no deltas.</summary>
    internal static XbzrleSave? For(RamFigures figures, RamBlock[] blocks) => figures.Xbzrle is { } own && blocks.Length > 0 ? new XbzrleSave(blocks, own) : null;

    /// <summary>The scan has come to the end of RAM. The first pass does without the cache: the destination has nothing yet.</summary>
    internal void OnEndOfPass() => _started = true;

    /// <summary>The VM is stopped and each page goes at most once more, so nothing has to be kept any more.</summary>
    internal void OnLastStage() => _isLastStage = true;

    /// <summary>Decides how a dirty page is sent.</summary>
    /// <param name="block">The block.</param>
    /// <param name="page">Index in the block.</param>
    /// <param name="isZero">The page is sent as a zero page.</param>
    /// <param name="pass">Number of dirty bitmap synchronisations.</param>
    internal XbzrleStep Next(RamBlock block, long page, bool isZero, long pass)
    {
        if (!_started) return XbzrleStep.AsUsual;
        long place = FirstPage(block) + page;
        if (isZero)
        {
            // Also a page that was not there: a small write into it then makes a small delta.
            _cache.Insert(place, pass).Clear();
            return XbzrleStep.AsUsual;
        }
        ReadOnlySpan<byte> content = block.ReadOnlySlice((ulong)page * PageSize, PageSize);
        Span<byte> sent = _cache.Find(place, pass);
        if (sent.IsEmpty)
        {
            _figures.OnMiss();
            sent = _isLastStage ? default : _cache.Insert(place, pass);
            if (sent.IsEmpty) return XbzrleStep.AsUsual;
            content.CopyTo(_page);
            _page.CopyTo(sent);
            _isCopy = true;
            return XbzrleStep.Copy;
        }
        _figures.OnHit();
        content.CopyTo(_page);
        _deltaBytes = Xbzrle.Encode(sent, _page, _delta.AsSpan(HeaderBytes));
        if (_deltaBytes == 0) return XbzrleStep.Nothing;
        if (!_isLastStage) _page.CopyTo(sent);
        _isCopy = _deltaBytes < 0;
        if (!_isCopy) return XbzrleStep.Delta;
        _figures.OnOverflow();
        return XbzrleStep.Copy;
    }

    /// <summary>Writes what <see cref="Next"/> has prepared.</summary>
    /// <param name="f">The stream, behind the record's first word and name.</param>
    /// <param name="start">Where the record began.</param>
    internal void Write(QemuFileWriter f, long start)
    {
        if (_isCopy)
        {
            f.Write(_page);
            return;
        }
        _delta[0] = RamConstants.XbzrleEncoding;
        BinaryPrimitives.WriteUInt16BigEndian(_delta.AsSpan(1), (ushort)_deltaBytes);
        f.Write(_delta.AsSpan(0, HeaderBytes + _deltaBytes));
        _figures.OnDelta(f.Position - start - 8);
    }

    public void Dispose() => _cache.Dispose();

    private long FirstPage(RamBlock block)
    {
        if (!ReferenceEquals(_blocks[_block].Block, block)) _block = Array.FindIndex(_blocks, b => ReferenceEquals(b.Block, block));
        return _blocks[_block].FirstPage;
    }
}
