namespace Vmm.Devices.Vfio.Device;

/// <summary>Lets one message an interval through and counts the others, for what a guest or a peer can trigger. Thread-safe.</summary>
/// <param name="time">The clock.</param>
/// <param name="interval">Least time between two messages.</param>
internal sealed class RateLimit(TimeProvider time, TimeSpan interval)
{
    private readonly Lock _gate = new();
    private long _last = long.MinValue, _dropped;

    /// <summary>Asks for one message.</summary>
    /// <param name="dropped">How many were dropped since the last one that passed.</param>
    /// <returns>True to write it.</returns>
    internal bool TryPass(out long dropped)
    {
        lock (_gate)
        {
            long now = time.GetTimestamp();
            dropped = _dropped;
            if (_last != long.MinValue && time.GetElapsedTime(_last, now) < interval)
            {
                _dropped++;
                return false;
            }
            (_last, _dropped) = (now, 0);
            return true;
        }
    }
}
