using System.Diagnostics;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>
/// The <c>ram</c> section of one VM, saving side in this file, loading side in RamMigration.Load.cs (spec 3; QEMU: <c>savevm_ram_handlers</c>).
/// One migration at a time; counters may be read by any thread.
/// </summary>
internal sealed partial class RamMigration(GuestMemory memory, Bql bql) : IMachineComponent, ISaveSetup, ISaveLive, ILoadState
{
    private const int PageSize = RamBlock.PageSize;
    private const int PagesPerClockCheck = 64;

    private IDisposable? _registration;
    private BlockState[] _blocks = [];
    private RamBlock? _lastNamed;
    private int _scanBlock;
    private int _scanWord;
    private bool _logging;
    private long _periodStart;
    private long _periodDirtyPages;
    private long _normalPages;
    private long _zeroPages;
    private long _dirtyPages;
    private long _dirtyPagesRate;
    private long _syncCount;

    public MachinePhase Phase => MachinePhase.BeforeDevices;

    /// <summary>Send every page as data (<c>zero-page-detection=none</c>).</summary>
    internal bool DetectZeroPages { get; set; } = true;

    /// <summary>Which blocks' pages stay out of the stream because the other side has the memory itself.</summary>
    internal IgnoredRam Ignored { get; set; }

    internal long NormalPages => Volatile.Read(ref _normalPages);

    internal long ZeroPages => Volatile.Read(ref _zeroPages);

    internal long RemainingBytes => Volatile.Read(ref _dirtyPages) * PageSize;

    internal long DirtyPagesRate => Volatile.Read(ref _dirtyPagesRate);

    /// <summary>Dirty bitmap synchronisations of this migration; the setup counts as the first.</summary>
    internal long SyncCount => Volatile.Read(ref _syncCount);

    /// <summary>Bytes that this migration may have to send; ignored blocks do not count.</summary>
    internal long TotalBytes => memory.Blocks.Sum(b => IsIgnored(b, Ignored) ? 0 : (long)b.SizeBytes);

    public bool IsActiveIterate => true;

    public void Attach(IDeviceServices services)
    {
        _registration = services.SaveVm.Register(
            new SaveVmRegistration { IdStr = RamConstants.IdStr, InstanceId = 0, VersionId = RamConstants.VersionId, MinimumVersionId = RamConstants.VersionId },
            SaveVmHandlers.Of(this));
        services.SaveVm.ReserveSectionId(); // QEMU registers dirty-bitmap here; our ids then equal those of 11.1.
    }

    public void SavePrepare()
    {
    }

    /// <summary>Setup record: u64 total|MEM_SIZE, then per block cs name, u64 length; u64 EOS (spec 3.2).</summary>
    public void SaveSetup(QemuFileWriter f, CancellationToken cancel)
    {
        // QEMU lists the largest block first; the order also decides which pages go first.
        RamBlock[] all = [.. memory.Blocks.OrderByDescending(static b => b.SizeBytes)];
        _blocks = [.. all.Where(b => !IsIgnored(b, Ignored)).Select(static b => new BlockState(b))];
        _lastNamed = null;
        _scanBlock = _scanWord = 0;
        _normalPages = _zeroPages = _dirtyPagesRate = _periodDirtyPages = 0;
        _syncCount = 1;
        _periodStart = Stopwatch.GetTimestamp();
        if (_blocks.Length > 0)
        {
            memory.StartDirtyLog();
            _logging = true;
        }
        foreach (BlockState block in _blocks)
        {
            block.Bitmap.SetAll();
            // After the log has started: a page that gets its memory from here on is marked there and sent again.
            block.Block.FindHoles(block.Holes);
        }
        _dirtyPages = _blocks.Sum(static b => b.Block.PageCount);

        // The list is of all blocks, ignored or not, so that the other side can compare.
        f.WriteUInt64(memory.TotalBytes | (ulong)RamSaveFlags.MemSize);
        foreach (RamBlock block in all)
        {
            f.WriteCountedString(block.Name);
            f.WriteUInt64(block.SizeBytes);
            if (Ignored == IgnoredRam.SharedFiles) f.WriteUInt64(block.Address.Value);
        }
        _harvested = false;
        SyncChannels(f, always: true);
        f.WriteUInt64((ulong)RamSaveFlags.Eos);
    }

    public PendingBytes EstimatePending() => new(RemainingBytes);

    public PendingBytes ExactPending()
    {
        bql.AssertHeld();
        Synchronise();
        return new(RemainingBytes);
    }

    public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
    {
        bool done = SendDirtyPages(f, budget);
        f.WriteUInt64((ulong)RamSaveFlags.Eos);
        return done ? SaveProgress.Done : SaveProgress.More;
    }

    public void SaveLiveCompletePrecopy(QemuFileWriter f)
    {
        bql.AssertHeld();
        Synchronise();
        SendDirtyPages(f, IterateBudget.Unlimited);
        SyncChannels(f, always: true);
        f.WriteUInt64((ulong)RamSaveFlags.Eos);
    }

    public void SaveCleanup()
    {
        if (!_logging) return;
        _logging = false;
        memory.StopDirtyLog();
        _blocks = [];
        _dirtyPages = 0;
    }

    public void Dispose() => _registration?.Dispose();

    private static bool IsIgnored(RamBlock block, IgnoredRam ignored) => ignored switch
    {
        IgnoredRam.All => true,
        IgnoredRam.SharedFiles => block is { IsShared: true, FilePath: not null },
        _ => false,
    };

    private void Synchronise()
    {
        long dirty = 0;
        foreach (BlockState block in _blocks)
        {
            block.Harvest(memory);
            dirty += block.Bitmap.Count();
        }
        _harvested = true;
        long added = dirty - _dirtyPages;
        Volatile.Write(ref _dirtyPages, dirty);
        Volatile.Write(ref _syncCount, _syncCount + 1);
        _periodDirtyPages += added;
        TimeSpan period = Stopwatch.GetElapsedTime(_periodStart);
        if (period < TimeSpan.FromSeconds(1)) return;
        Volatile.Write(ref _dirtyPagesRate, (long)(_periodDirtyPages / period.TotalSeconds));
        _periodDirtyPages = 0;
        _periodStart = Stopwatch.GetTimestamp();
    }

    /// <summary>Scans from the last place, word by word; a word's marks are cleared before its pages are read. True when nothing is dirty any more.</summary>
    private bool SendDirtyPages(QemuFileWriter f, IterateBudget budget)
    {
        int sinceCheck = 0;
        if (_harvested) SyncChannels(f, always: false);
        _harvested = false;
        for (int visited = 0; visited <= _blocks.Length;)
        {
            if (_blocks.Length == 0) return true;
            BlockState block = _blocks[_scanBlock];
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
                    Volatile.Write(ref _dirtyPages, _dirtyPages - 1);
                    if (!budget.IsOverBytes(f.Position) && (++sinceCheck < PagesPerClockCheck || !budget.IsExhausted(f.Position)))
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
            visited++;
        }
        return true;
    }

    private void SendPage(QemuFileWriter f, RamBlock block, long page, bool isHole)
    {
        ulong record = (ulong)page * PageSize;
        bool zero = DetectZeroPages && (isHole || block.IsZeroPage(page));
        if (!zero && Sender is { } sender)
        {
            sender.AddPage(block, page);
            f.NoteMoved(PageSize);
            Volatile.Write(ref _normalPages, _normalPages + 1);
            return;
        }
        record |= (ulong)(zero ? RamSaveFlags.Zero : RamSaveFlags.Page);
        bool named = !ReferenceEquals(block, _lastNamed);
        if (!named) record |= (ulong)RamSaveFlags.Continue;
        if (!zero && !named)
        {
            f.WriteGuestPage(record, block, page);
            Volatile.Write(ref _normalPages, _normalPages + 1);
            return;
        }
        f.WriteUInt64(record);
        if (named)
        {
            f.WriteCountedString(block.Name);
            _lastNamed = block;
        }
        if (zero)
        {
            f.WriteByte(0);
            Volatile.Write(ref _zeroPages, _zeroPages + 1);
        }
        else
        {
            f.WriteGuest(block, (ulong)page * PageSize, PageSize);
            Volatile.Write(ref _normalPages, _normalPages + 1);
        }
    }

    private sealed class BlockState(RamBlock block)
    {
        private DirtyBitmap? _written;

        internal RamBlock Block { get; } = block;

        internal DirtyBitmap Bitmap { get; } = new(block.PageCount);

        /// <summary>Pages without memory when the migration began, and neither written nor sent since.</summary>
        internal DirtyBitmap Holes { get; } = new(block.PageCount);

        /// <summary>Moves the log's marks into <see cref="Bitmap"/>. A page whose first turn is still to come may have been written meanwhile: it is no hole then.</summary>
        internal void Harvest(GuestMemory memory)
        {
            if (Holes.FindNext(0) == Holes.PageCount)
            {
                memory.HarvestDirtyLog(Block, Bitmap);
                return;
            }
            _written ??= new DirtyBitmap(Block.PageCount);
            memory.HarvestDirtyLog(Block, _written);
            for (int i = 0; i < _written.WordCount; i++)
            {
                ulong marks = _written.TakeWord(i);
                if (marks == 0) continue;
                Bitmap.OrWord(i, marks);
                Holes.OrWord(i, Holes.TakeWord(i) & ~marks);
            }
        }
    }
}
