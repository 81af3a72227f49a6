using System.Diagnostics;
using System.Globalization;
using Vmm.Core.Interop;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>
/// Measures how often this host keeps a runnable thread from running: the share of time in pauses longer than <paramref name="pause"/>, and the
/// share in pauses that the host's scheduler does not count, because a hypervisor below took the processor away.
/// </summary>
internal sealed class BareThread(TimeSpan pause)
{
    private TimeSpan _paused, _unknown, _watched;

    /// <summary>Share of the watched time that the thread spent in such pauses.</summary>
    internal double Share => Of(_paused);

    /// <summary>Share of the watched time in pauses that are still too long after subtracting the wait that the scheduler counts.</summary>
    internal double UnknownShare => Of(_unknown);

    /// <summary>
    /// The greatest number of moves that such pauses hit by chance, where each move has two ends. A Poisson count exceeds it once in 740 runs, which is
    /// the rate of a one-sided limit of three standard deviations; the counts are too small for a normal distribution.
    /// </summary>
    internal static int Most(int things, double share)
    {
        double expected = things * Math.Min(1, 2 * share), here = Math.Exp(-expected), more = 1 - here;
        int most = 0;
        for (; more > 1.0 / 740; more -= here) here *= expected / ++most;
        return most;
    }

    /// <summary>Spins for this time, as a vCPU does, and records the pauses.</summary>
    internal void Watch(TimeSpan time)
    {
        string schedstat = $"/proc/self/task/{Posix.ThreadId}/schedstat";
        ulong waited = VcpuDelay.WaitNs(schedstat);
        long start = Stopwatch.GetTimestamp(), last = Stopwatch.GetTimestamp();
        while (Stopwatch.GetElapsedTime(start, last) < time)
        {
            long now = Stopwatch.GetTimestamp();
            TimeSpan gap = Stopwatch.GetElapsedTime(last, now);
            if (gap > pause)
            {
                _paused += gap;
                ulong known = VcpuDelay.WaitNs(schedstat);
                TimeSpan rest = gap - TimeSpan.FromMicroseconds((known - waited) / 1000.0);
                if (rest > pause) _unknown += rest;
                waited = known;
                now = Stopwatch.GetTimestamp();
            }
            last = now;
        }
        _watched += Stopwatch.GetElapsedTime(start, last);
    }

    public override string ToString() => string.Create(CultureInfo.InvariantCulture, $"a bare thread spends {100 * Share:f1} % in pauses over {pause.TotalMilliseconds:f0} ms, {100 * UnknownShare:f1} % in such that its schedstat does not show");

    private double Of(TimeSpan time) => _watched > TimeSpan.Zero ? time / _watched : 0;
}
