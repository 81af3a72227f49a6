using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>Figures of the deltas of one attempt. Its thread writes them, any thread reads them (QEMU: <c>xbzrle_counters</c>).</summary>
/// <param name="cacheSizeBytes">Parameter xbzrle-cache-size.</param>
internal sealed class XbzrleFigures(ulong cacheSizeBytes)
{
    private readonly Lock _gate = new();
    private long _bytes, _pages, _deltas, _misses, _overflows;
    private (long Bytes, long Pages, long Sent, long Misses) _periodStart;
    private double _missRate, _encodingRate;

    internal ulong CacheSizeBytes => cacheSizeBytes;

    /// <summary>Bytes of deltas with their headers but for 8 bytes each, and of the pages that had no room in one.</summary>
    internal long Bytes => Volatile.Read(ref _bytes);

    /// <summary>Pages that the cache had, whatever was then sent.</summary>
    internal long Pages => Volatile.Read(ref _pages);

    /// <summary>Pages that the cache did not have.</summary>
    internal long Misses => Volatile.Read(ref _misses);

    /// <summary>Pages that had no room in a delta.</summary>
    internal long Overflows => Volatile.Read(ref _overflows);

    /// <summary>Misses of the last period for each page sent, and how much smaller than its pages the deltas were.</summary>
    internal (double Miss, double Encoding) Rates
    {
        get { lock (_gate) return (_missRate, _encodingRate); }
    }

    internal void OnMiss() => Volatile.Write(ref _misses, _misses + 1);

    internal void OnHit() => Volatile.Write(ref _pages, _pages + 1);

    internal void OnOverflow()
    {
        Volatile.Write(ref _overflows, _overflows + 1);
        Volatile.Write(ref _bytes, _bytes + RamBlock.PageSize);
    }

    internal void OnDelta(long bytes)
    {
        _deltas++;
        Volatile.Write(ref _bytes, _bytes + bytes);
    }

    /// <summary>Ends a period (QEMU: <c>migration_update_rates</c>).</summary>
    /// <param name="pages">Pages sent so far in other ways.</param>
    internal void OnPeriod(long pages)
    {
        (long Bytes, long Pages, long Sent, long Misses) now = (_bytes, _pages, pages + _deltas, _misses);
        if (now.Sent == _periodStart.Sent) return;
        long bytes = now.Bytes - _periodStart.Bytes;
        lock (_gate)
        {
            _missRate = (double)(now.Misses - _periodStart.Misses) / (now.Sent - _periodStart.Sent);
            _encodingRate = bytes == 0 ? 0 : (double)(now.Pages - _periodStart.Pages) * RamBlock.PageSize / bytes;
        }
        _periodStart = now;
    }
}
