namespace Vmm.Core.RunStates;

/// <summary>
/// Takes processor time from a VM's guest, so that it dirties less while it migrates (QEMU: <c>cpu_throttle_set</c>). vCPUs and workloads run for 10 ms and then
/// sleep for the throttled share. Whoever sets it must end it. Thread-safe.
/// </summary>
internal sealed class CpuThrottle
{
    /// <summary>Time that a throttled vCPU runs between two sleeps (QEMU: CPU_THROTTLE_TIMESLICE_NS).</summary>
    internal const double RunMs = 10;

    private const int MaxPercent = 99;

    private readonly Lock _gate = new();
    private readonly List<Action> _handlers = [];
    private volatile int _percent;

    /// <summary>The share of time that the guest sleeps; 0 when it is not throttled.</summary>
    internal int Percent => _percent;

    /// <summary>The sleep after a time of running.</summary>
    internal static double SleepMs(int percent, double runMs = RunMs) => runMs * percent / (100 - percent);

    /// <summary>Sets the share, at most 99; 0 ends the throttle, and every sleep at once. BQL: held or not.</summary>
    internal void Set(int percent)
    {
        lock (_gate)
        {
            _percent = Math.Clamp(percent, 0, MaxPercent);
            foreach (Action handler in _handlers) handler();
        }
    }

    /// <summary>Calls a handler after each change, on the changing thread. It must not wait.</summary>
    /// <returns>Dispose to end; afterwards the handler is not called any more.</returns>
    internal IDisposable OnChange(Action handler)
    {
        lock (_gate) _handlers.Add(handler);
        return new Registration(() =>
        {
            lock (_gate) _handlers.Remove(handler);
        });
    }
}

/// <summary>Waits in whole milliseconds that are exact on average: what one was too short or too long, the next ones make up for.</summary>
internal struct ThrottleDebt
{
    private double _ms;

    /// <summary>Begins a wait.</summary>
    /// <param name="wantedMs">Its length.</param>
    /// <returns>Whole milliseconds to wait now.</returns>
    internal int Begin(double wantedMs)
    {
        _ms += wantedMs;
        return (int)Math.Max(Math.Round(_ms), 0);
    }

    /// <summary>Notes how long it was.</summary>
    internal void End(double waitedMs) => _ms = Math.Max(_ms - waitedMs, -CpuThrottle.RunMs);

    /// <summary>Forgets what is owed, after a wait that ended early.</summary>
    internal void Clear() => _ms = 0;
}
