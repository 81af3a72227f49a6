using System.Diagnostics;

namespace Vmm.Core.Threading;

/// <summary>CLOCK_MONOTONIC in ns; all processes of a host see the same clock. Thread-safe.</summary>
internal static class MonotonicClock
{
    /// <summary>The present time, ns.</summary>
    public static long NowNs => ToNs(Stopwatch.GetTimestamp());

    /// <summary>Converts a timestamp to the time of this clock.</summary>
    /// <param name="timestamp">By <see cref="Stopwatch.GetTimestamp"/>.</param>
    /// <returns>Nanoseconds.</returns>
    public static long ToNs(long timestamp) => (long)(timestamp * (1e9 / Stopwatch.Frequency));
}
