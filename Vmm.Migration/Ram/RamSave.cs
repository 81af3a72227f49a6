using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>
/// One attempt to save guest RAM (stream 3; QEMU: <c>RAMState</c>). Calls come one after the other; <see cref="Figures"/> may be read by any thread.
/// </summary>
internal sealed class RamSave : ISaveSetup, ISaveLive, ISaveCleanup
{
    private const int PageSize = RamBlock.PageSize;
    private const int PagesPerClockCheck = 64;

    private readonly GuestMemory _memory;
    private readonly Bql _bql;
    private readonly IgnoredRam _ignored;
    private readonly SaveContext _context;
    private readonly bool _detectZeroPages;
    private readonly XbzrleSave? _xbzrle;
    private MappedRamSave? _mapped;
    private RamBlockScan[] _blocks = [];
    private RamBlock? _lastNamed;
    private int _scanBlock;
    private int _scanWord;
    private bool _logging;
    private bool _harvested;
    private long _notedBytes;

    internal RamSave(GuestMemory memory, Bql bql, SaveContext context)
    {
        (_memory, _bql, _context) = (memory, bql, context);
        _ignored = IgnoredRamRule.Of(context.Mode, context.Capabilities);
        _detectZeroPages = context.Parameters.ZeroPageDetection != ZeroPageDetection.None;
        RamBlock[] sent = [.. memory.Blocks.Where(b => !_ignored.Covers(b))];
        Figures = new RamFigures(sent.Sum(static b => (long)b.SizeBytes), XbzrleSave.FiguresFor(context)) { Channels = context.DataChannels };
        _xbzrle = XbzrleSave.For(Figures, sent);
    }

    /// <summary>What has been sent and what is left.</summary>
    internal RamFigures Figures { get; }

    public bool IsActiveIterate => true;

    private IDataChannels? Channels => _context.DataChannels;

    private bool SyncsEachSection => _context.Parameters.MultifdFlushAfterEachSection;

    /// <summary>Setup record: u64 total|MEM_SIZE, then per block cs name, u64 length; u64 EOS (stream 3.2). BQL: held.</summary>
    public void SaveSetup(QemuFileWriter f)
    {
        // QEMU lists the largest block first; the order also decides which pages go first.
        RamBlock[] all = [.. _memory.Blocks.OrderByDescending(static b => b.SizeBytes)];
        _blocks = [.. all.Where(b => !_ignored.Covers(b)).Select(static b => new RamBlockScan(b))];
        if (_blocks.Length > 0)
        {
            _memory.StartDirtyLog();
            _logging = true;
        }
        // After the start of the log: a page that gets memory from now on is marked in the log and sent again.
        foreach (RamBlockScan block in _blocks) block.MarkAll();
        Figures.Begin(_blocks.Sum(static b => b.Block.PageCount));

        if (_context.Capabilities.IsOn(MigrationCapability.MappedRam)) _mapped = new MappedRamSave(f);
        // The list has all blocks, also those that are left out, so that the destination can compare.
        f.WriteUInt64(_memory.TotalBytes | (ulong)RamSaveFlags.MemSize);
        foreach (RamBlock block in all)
        {
            f.WriteCountedString(block.Name);
            f.WriteUInt64(block.SizeBytes);
            if (_context.Capabilities.IsOn(MigrationCapability.XIgnoreShared)) f.WriteUInt64(block.Address.Value);
            _mapped?.AddBlock(block, _ignored.Covers(block));
        }
        SyncChannels(f, always: true);
        EndSection(f);
    }

    public PendingBytes EstimatePending() => new(Figures.RemainingBytes);

    public PendingBytes ExactPending()
    {
        _bql.AssertHeld();
        Synchronise();
        return new(Figures.RemainingBytes);
    }

    public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
    {
        bool done = SendDirtyPages(f, budget);
        _mapped?.Flush();
        // Whoever waits for the main channel now waits for the channels, too.
        if (done) SyncChannels(f, always: false);
        EndSection(f);
        return done ? SaveProgress.Done : SaveProgress.More;
    }

    public void SaveLiveCompletePrecopy(QemuFileWriter f)
    {
        _bql.AssertHeld();
        Synchronise();
        _xbzrle?.OnLastStage();
        SendDirtyPages(f, IterateBudget.Unlimited);
        _mapped?.End();
        SyncChannels(f, always: true);
        EndSection(f);
    }

    public void SaveCleanup()
    {
        _xbzrle?.Dispose();
        if (!_logging) return;
        _logging = false;
        _memory.StopDirtyLog();
        _blocks = [];
        Figures.End();
    }

    private void Synchronise()
    {
        long before = 0, dirty = 0;
        foreach (RamBlockScan block in _blocks)
        {
            before += block.Bitmap.Count();
            dirty += block.Harvest(_memory);
        }
        // A page that was waiting already cannot be overtaken by itself.
        _harvested |= dirty > before;
        Figures.OnSync(dirty);
    }

    /// <summary>
    /// Makes the channels wait for each other. Between two harvests of dirty marks a page goes at most once, so it is enough that no page of a harvest overtakes
    /// one of the harvest before. (QEMU syncs at the end of each pass, for the same purpose.)
    /// </summary>
    private void SyncChannels(QemuFileWriter f, bool always)
    {
        if (SyncsEachSection || Channels is not { } channels || !channels.Sync(always)) return;
        f.WriteUInt64((ulong)RamSaveFlags.MultifdFlush);
        // The destination's channels wait for this mark.
        f.Flush();
    }

    /// <summary>Ends a section's body. For a peer that needs it so, the end is also the mark of a SYNC.</summary>
    private void EndSection(QemuFileWriter f)
    {
        bool syncs = SyncsEachSection && Channels is not null;
        if (syncs) Channels!.Sync(always: true);
        NoteSent(f);
        f.WriteUInt64((ulong)RamSaveFlags.Eos);
        if (syncs) f.Flush();
    }

    /// <summary>Counts what the channels have sent meanwhile as sent by the stream.</summary>
    internal void NoteSent(QemuFileWriter f)
    {
        if (Channels is not { } channels) return;
        long bytes = channels.Sent.Bytes;
        f.NoteMoved(bytes - _notedBytes);
        _notedBytes = bytes;
    }

    /// <summary>
    /// Sends dirty pages from where the last call ended. A word's marks are cleared before its pages are read. True when no page is dirty any more.
    /// </summary>
    private bool SendDirtyPages(QemuFileWriter f, IterateBudget budget)
    {
        int sinceCheck = 0;
        if (_harvested) SyncChannels(f, always: false);
        _harvested = false;
        for (int visited = 0; visited <= _blocks.Length;)
        {
            if (_blocks.Length == 0) return true;
            RamBlockScan block = _blocks[_scanBlock];
            DirtyBitmap bitmap = block.Bitmap;
            while (_scanWord < bitmap.WordCount)
            {
                ulong marks = bitmap.TakeWord(_scanWord);
                if (marks == 0) { _scanWord++; continue; }
                ulong holes = block.Holes.TakeWord(_scanWord);
                long basePage = (long)_scanWord << 6;
                while (marks != 0)
                {
                    int bit = System.Numerics.BitOperations.TrailingZeroCount(marks);
                    marks &= marks - 1;
                    SendPage(f, block.Block, basePage + bit, (holes >> bit & 1) != 0);
                    if (!budget.IsOverBytes(f.Position) && (++sinceCheck < PagesPerClockCheck || !IsExhausted(f, budget)))
                    {
                        if (sinceCheck >= PagesPerClockCheck) sinceCheck = 0;
                        continue;
                    }
                    bitmap.OrWord(_scanWord, marks);
                    block.Holes.OrWord(_scanWord, holes & marks);
                    return false;
                }
                _scanWord++;
            }
            _scanWord = 0;
            _scanBlock = (_scanBlock + 1) % _blocks.Length;
            if (_scanBlock == 0) _xbzrle?.OnEndOfPass();
            visited++;
        }
        return true;
    }

    private bool IsExhausted(QemuFileWriter f, IterateBudget budget)
    {
        NoteSent(f);
        return budget.IsExhausted(f.Position);
    }

    private void SendPage(QemuFileWriter f, RamBlock block, long page, bool isHole)
    {
        if (Channels is { DetectsZeroPages: true } all)
        {
            Figures.OnQueued();
            all.AddPage(block, page, isHole);
            return;
        }
        ulong record = (ulong)page * PageSize;
        bool zero = _detectZeroPages && (isHole || block.IsZeroPage(page));
        if (!zero && Channels is { } channels)
        {
            Figures.OnQueued();
            channels.AddPage(block, page, isZero: false);
            return;
        }
        XbzrleStep step = _xbzrle?.Next(block, page, zero, Figures.SyncCount) ?? XbzrleStep.AsUsual;
        if (step is XbzrleStep.Nothing or XbzrleStep.Delta) Figures.OnDelta();
        else Figures.OnPage(zero);
        if (step == XbzrleStep.Nothing) return;
        if (_mapped is { } mapped)
        {
            mapped.Save(block, page, zero);
            return;
        }
        record |= (ulong)(zero ? RamSaveFlags.Zero : step == XbzrleStep.Delta ? RamSaveFlags.Xbzrle : RamSaveFlags.Page);
        bool named = !ReferenceEquals(block, _lastNamed);
        if (!named) record |= (ulong)RamSaveFlags.Continue;
        if (!zero && !named && step == XbzrleStep.AsUsual)
        {
            f.WriteGuestPage(record, block, page);
            return;
        }
        long start = f.Position;
        f.WriteUInt64(record);
        if (named)
        {
            f.WriteCountedString(block.Name);
            _lastNamed = block;
        }
        if (zero) f.WriteByte(0);
        else if (step != XbzrleStep.AsUsual) _xbzrle!.Write(f, start);
        else f.WriteGuest(block, (ulong)page * PageSize, PageSize);
    }
}
