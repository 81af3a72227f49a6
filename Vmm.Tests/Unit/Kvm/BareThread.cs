using System.Diagnostics;
using System.Globalization;
using Vmm.Core.Interop;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>
/// What this host does to any thread that wants to run: how likely a moment lies in a pause that is longer than so much, and in one that the
/// host's own scheduler does not know of, such as those of a virtual host whose processors are taken away.
/// </summary>
internal sealed class BareThread(TimeSpan pause)
{
    private TimeSpan _paused, _unknown, _watched;

    /// <summary>Share of the time watched that was spent in such pauses.</summary>
    internal double Share => Of(_paused);

    /// <summary>Share of the time in pauses that remain so long without the wait that the scheduler shows.</summary>
    internal double UnknownShare => Of(_unknown);

    /// <summary>
    /// How many of so many things with two ends such pauses may hit: more are seen once in 740 times, as it is with three times the spread where the
    /// numbers are large. They are small here, and the law of small numbers says how small.
    /// </summary>
    internal static int Most(int things, double share)
    {
        double expected = things * Math.Min(1, 2 * share), here = Math.Exp(-expected), more = 1 - here;
        int most = 0;
        for (; more > 1.0 / 740; more -= here) here *= expected / ++most;
        return most;
    }

    /// <summary>Runs for a while, as a vCPU does.</summary>
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
