using System.Diagnostics;
using Vmm.Core.RunStates;

namespace Vmm.Core.Kvm;

/// <summary>The sleeps of a throttled vCPU, on its own thread and without the BQL. A stop request ends one at once.</summary>
internal sealed partial class KvmVcpu
{
    private ThrottleDebt _sleepDebt;
    private double _sleepMs;
    private long _sleeps;

    /// <summary>Number of sleeps so far.</summary>
    internal long Sleeps => Volatile.Read(ref _sleeps);

    /// <summary>Makes a running vCPU leave the guest and sleep, once; does nothing to a parked one. Any thread.</summary>
    /// <param name="ms">Length of the sleep; 0 ends the present one.</param>
    internal void Sleep(double ms)
    {
        lock (_gate)
        {
            if (_phase != Phase.Running) return;
            _sleepMs = ms;
            Monitor.PulseAll(_gate);
        }
        if (ms > 0) Kick();
    }

    /// <summary>Sleeps if somebody has asked for it. On the vCPU's thread, outside the guest.</summary>
    private void SleepIfAsked()
    {
        lock (_gate)
        {
            if (_sleepMs == 0) return;
            long start = Stopwatch.GetTimestamp();
            double asked = _sleepMs, slept = 0;
            int whole = _sleepDebt.Begin(asked);
            // A tick that comes during the sleep asks for nothing new.
            while (!_stop && _sleepMs > 0 && slept < whole)
            {
                Monitor.Wait(_gate, (int)Math.Ceiling(whole - slept));
                slept = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
            }
            if (_stop || _sleepMs == 0) _sleepDebt.Clear();
            else _sleepDebt.End(slept);
            _sleepMs = 0;
            Volatile.Write(ref _sleeps, _sleeps + 1);
        }
    }
}
