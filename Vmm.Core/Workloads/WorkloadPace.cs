using System.Diagnostics;
using Vmm.Core.RunStates;

namespace Vmm.Core.Workloads;

/// <summary>
/// Says when a workload's next steps are due, by its rate, and when it must sleep, because its VM's guest is throttled: as a vCPU does, it sleeps for a share of
/// the time that it has run. One thread.
/// </summary>
/// <param name="stepsPerSecond">Rate; 0 for no limit.</param>
/// <param name="throttle">The VM's.</param>
internal sealed class WorkloadPace(long stepsPerSecond, CpuThrottle throttle)
{
    internal const int BurstSteps = 1024;
    private const int SliceMs = 5;

    private long _epoch, _done;
    private long _runsSince, _sleepsSince;
    private int _sleepMs;
    private ThrottleDebt _debt;

    /// <summary>How long the sleep that has begun still takes, ms; 0 or less when it is over.</summary>
    internal int SleepLeftMs => throttle.Percent == 0 ? 0 : (int)Math.Ceiling(_sleepMs - Stopwatch.GetElapsedTime(_sleepsSince).TotalMilliseconds);

    /// <summary>Begins to count steps anew.</summary>
    internal void Restart()
    {
        _epoch = Stopwatch.GetTimestamp();
        _done = 0;
    }

    internal void OnStep() => _done++;

    /// <summary>Returns the number of steps due now; if it is 0, sets the time to wait for the next ones.</summary>
    internal int Due(out int waitMs)
    {
        waitMs = 0;
        if (stepsPerSecond == 0) return BurstSteps;
        double seconds = Stopwatch.GetElapsedTime(_epoch).TotalSeconds;
        long due = (long)(seconds * stepsPerSecond) - _done;
        // Drop the backlog of a longer delay, because a real guest that was delayed does not run faster afterwards.
        if (due > stepsPerSecond / 10 + BurstSteps) Restart();
        if (due > 0) return (int)Math.Min(due, BurstSteps);
        waitMs = (int)Math.Clamp(Math.Ceiling((((_done + 1.0) / stepsPerSecond) - seconds) * 1000), SliceMs, 1000);
        return 0;
    }

    /// <summary>Begins a sleep if the guest is throttled and has run long enough.</summary>
    /// <returns>False if there is none.</returns>
    internal bool BeginSleep()
    {
        double ranMs = Stopwatch.GetElapsedTime(_runsSince).TotalMilliseconds;
        int percent = throttle.Percent;
        if (percent == 0 || ranMs < CpuThrottle.RunMs) return false;
        _sleepsSince = Stopwatch.GetTimestamp();
        // A guest that was not throttled before does not sleep for all that time.
        _sleepMs = _debt.Begin(CpuThrottle.SleepMs(percent, Math.Min(ranMs, 2 * CpuThrottle.RunMs)));
        return true;
    }

    /// <summary>Ends a sleep, after its time or before.</summary>
    internal void EndSleep()
    {
        _runsSince = Stopwatch.GetTimestamp();
        double sleptMs = Stopwatch.GetElapsedTime(_sleepsSince, _runsSince).TotalMilliseconds;
        if (sleptMs < _sleepMs) _debt.Clear();
        else _debt.End(sleptMs);
        // What was not due because of the sleep is not made up for afterwards.
        _epoch += _runsSince - _sleepsSince;
    }
}
