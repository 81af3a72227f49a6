using System.Diagnostics;

namespace Vmm.Core.Threading;

/// <summary>CLOCK_MONOTONIC in ns, which all processes of a host share. Thread-safe.</summary>
internal static class MonotonicClock
{
    /// <summary>Now, ns.</summary>
    public static long NowNs => ToNs(Stopwatch.GetTimestamp());

    /// <summary>The same clock's time of a timestamp.</summary>
    /// <param name="timestamp">By <see cref="Stopwatch.GetTimestamp"/>.</param>
    /// <returns>ns.</returns>
    public static long ToNs(long timestamp) => (long)(timestamp * (1e9 / Stopwatch.Frequency));
}
