using System.Diagnostics;

namespace Vmm.Migration.State;

/// <summary>CLOCK_MONOTONIC, which all processes of a host share.</summary>
internal static class MonotonicClock
{
    internal static long NowNs => ToNs(Stopwatch.GetTimestamp());

    internal static long ToNs(long timestamp) => (long)(timestamp * (1e9 / Stopwatch.Frequency));
}
