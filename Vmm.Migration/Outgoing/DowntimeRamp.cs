using Vmm.Core.SaveVm;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Notices that passes no longer bring a migration nearer to its end, and raises the downtime limit then, up to <c>x-downtime-limit-max</c>. Without a clock and
/// without state of its VM, so that a table can test it.
/// </summary>
internal sealed class DowntimeRamp
{
    /// <summary>A pass made progress if it left at most this part of the least that one before it had left.</summary>
    private const double ProgressPart = 0.95;

    /// <summary>Shorter passes count together: while nothing can be sent, one comes every few milliseconds.</summary>
    private const double ShortestPassMs = 100;

    private const int MostSteps = 32;

    private double _passAtMs;
    private long _leastBytes = long.MaxValue;
    private int _steps;

    /// <summary>True when the last pass made no progress.</summary>
    internal bool IsStalled { get; private set; }

    /// <summary>Takes what a pass has left that did not fit into the downtime limit.</summary>
    internal void OnPass(double nowMs, long leftBytes)
    {
        if (nowMs < _passAtMs + ShortestPassMs) return;
        _passAtMs = nowMs;
        IsStalled = leftBytes > _leastBytes * ProgressPart;
        _leastBytes = Math.Min(_leastBytes, leftBytes);
        if (IsStalled && _steps < MostSteps) _steps++;
    }

    /// <summary>The parameters with the downtime limit in force: twice as long after each pass without progress.</summary>
    internal MigrationParameters Apply(MigrationParameters parameters)
    {
        if (_steps == 0 || parameters.MaxDowntimeLimitMs <= parameters.DowntimeLimitMs) return parameters;
        double limit = Math.Min(Math.Max(parameters.DowntimeLimitMs, 1) * Math.Pow(2, _steps), parameters.MaxDowntimeLimitMs);
        return parameters with { DowntimeLimitMs = (ulong)limit };
    }
}
