namespace Vmm.Devices.Vfio.Device;

/// <summary>Limits log messages that a guest or a peer can trigger: one per interval, the others are counted. Thread-safe.</summary>
/// <param name="time">The clock.</param>
/// <param name="interval">Shortest time between two messages.</param>
internal sealed class RateLimit(TimeProvider time, TimeSpan interval)
{
    private readonly Lock _gate = new();
    private long _last = long.MinValue, _dropped;

    /// <summary>Asks for one message.</summary>
    /// <param name="dropped">Number of messages dropped since the last one that was written.</param>
    /// <returns>True when the message may be written.</returns>
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
