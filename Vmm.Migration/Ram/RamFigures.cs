using System.Diagnostics;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Ram;

/// <summary>Figures of one <see cref="RamSave"/>. Its thread writes them, any thread reads them (QEMU: <c>RAMState</c>, <c>mig_stats</c>).</summary>
/// <param name="totalBytes">Bytes of RAM that the attempt does not leave out.</param>
/// <param name="xbzrle">Figures of deltas; null without them.</param>
internal sealed class RamFigures(long totalBytes, XbzrleFigures? xbzrle = null)
{
    private long _periodStart;
    private long _periodDirtyPages;
    private long _normalPages;
    private long _zeroPages;
    private long _dirtyPages;
    private long _dirtyPagesRate;
    private long _syncCount;

    /// <summary>The figures before an attempt has prepared its RAM.</summary>
    internal static RamFigures None { get; } = new(0);

    internal long TotalBytes => totalBytes;

    /// <summary>Channels that carry pages, too; null without.</summary>
    internal IDataChannels? Channels { get; init; }

    internal XbzrleFigures? Xbzrle => xbzrle;

    internal long NormalPages => Volatile.Read(ref _normalPages) + (Channels?.Sent.NormalPages ?? 0);

    internal long ZeroPages => Volatile.Read(ref _zeroPages) + (Channels?.Sent.ZeroPages ?? 0);

    internal long RemainingBytes => Volatile.Read(ref _dirtyPages) * RamBlock.PageSize;

    /// <summary>Pages a second that became dirty in the last period.</summary>
    internal long DirtyPagesRate => Volatile.Read(ref _dirtyPagesRate);

    /// <summary>Number of dirty bitmap synchronisations; the setup counts as the first.</summary>
    internal long SyncCount => Volatile.Read(ref _syncCount);

    internal void Begin(long pages)
    {
        Volatile.Write(ref _dirtyPages, pages);
        Volatile.Write(ref _syncCount, 1);
        _periodStart = Stopwatch.GetTimestamp();
    }

    /// <summary>Notes a page that a channel will send and count.</summary>
    internal void OnQueued() => Volatile.Write(ref _dirtyPages, _dirtyPages - 1);

    internal void OnPage(bool zero)
    {
        Volatile.Write(ref _dirtyPages, _dirtyPages - 1);
        if (zero) Volatile.Write(ref _zeroPages, _zeroPages + 1);
        else Volatile.Write(ref _normalPages, _normalPages + 1);
    }

    /// <summary>Notes a page that was sent as a delta, or not at all because the destination has it.</summary>
    internal void OnDelta() => Volatile.Write(ref _dirtyPages, _dirtyPages - 1);

    internal void OnSync(long dirtyPages)
    {
        _periodDirtyPages += dirtyPages - _dirtyPages;
        Volatile.Write(ref _dirtyPages, dirtyPages);
        Volatile.Write(ref _syncCount, _syncCount + 1);
        TimeSpan period = Stopwatch.GetElapsedTime(_periodStart);
        if (period < TimeSpan.FromSeconds(1)) return;
        Volatile.Write(ref _dirtyPagesRate, (long)(_periodDirtyPages / period.TotalSeconds));
        xbzrle?.OnPeriod(_normalPages + _zeroPages);
        _periodDirtyPages = 0;
        _periodStart = Stopwatch.GetTimestamp();
    }

    internal void End() => Volatile.Write(ref _dirtyPages, 0);
}
