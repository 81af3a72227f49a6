using Vmm.Core.SaveVm;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Decides how far the guest must be throttled (capability auto-converge; QEMU: <c>migration_trigger_throttle</c>, <c>mig_throttle_guest_down</c>). Without a clock
/// and without state of its VM, so that a table can test it.
/// </summary>
internal sealed class ThrottleDecision
{
    private const double PeriodMs = 1000;

    /// <summary>So many periods with too many dirty pages make one step.</summary>
    private const int PeriodsForStep = 2;

    private double _periodAtMs;
    private long _sentBytes, _dirtiedBytes;
    private int _highPeriods;

    /// <summary>The share of time that the guest must sleep; 0 for none.</summary>
    internal int Percent { get; private set; }

    /// <summary>Takes the figures of a synchronisation with the dirty log. It counts together with all others of a second.</summary>
    /// <param name="nowMs">Since the first page.</param>
    /// <param name="dirtiedBytes">What the guest has dirtied since the last synchronisation.</param>
    /// <param name="sentBytes">What has been sent since the first page.</param>
    /// <param name="parameters">The parameters in force.</param>
    /// <returns><see cref="Percent"/>.</returns>
    internal int Next(double nowMs, long dirtiedBytes, long sentBytes, MigrationParameters parameters)
    {
        _dirtiedBytes += dirtiedBytes;
        if (nowMs <= _periodAtMs + PeriodMs) return Percent;
        long allowed = (sentBytes - _sentBytes) * (long)parameters.ThrottleTriggerThresholdPercent / 100;
        if (_dirtiedBytes > allowed && ++_highPeriods >= PeriodsForStep)
        {
            _highPeriods = 0;
            Percent = Percent == 0 ? (int)parameters.CpuThrottleInitialPercent
                : Math.Min(Percent + Increment((double)allowed / _dirtiedBytes, parameters), (int)parameters.MaxCpuThrottlePercent);
        }
        (_periodAtMs, _sentBytes, _dirtiedBytes) = (nowMs, sentBytes, 0);
        return Percent;
    }

    /// <summary>With <c>cpu-throttle-tailslow</c> no more than what would bring the dirty rate down to the allowed one.</summary>
    private int Increment(double allowedPart, MigrationParameters parameters)
    {
        int increment = (int)parameters.CpuThrottleIncrementPercent;
        if (!parameters.HasCpuThrottleTailslow) return increment;
        int runs = 100 - Percent;
        return Math.Min(runs - (int)(runs * allowedPart), increment);
    }
}
