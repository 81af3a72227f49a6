namespace Vmm.Tools.Bench.Migrate;

/// <summary>All runs of one program in one scenario, and their figures.</summary>
internal sealed record Series(string Peer, double Gib, IReadOnlyList<RunResult> Runs)
{
    /// <summary>Runs that moved the VM.</summary>
    private IEnumerable<RunResult> Completed => Runs.Where(static r => r.Outcome == RunOutcome.Completed);
    /// <summary>What the program refused, or null.</summary>
    public string? Refused => Runs.FirstOrDefault(static r => r.Outcome == RunOutcome.Refused)?.Text;
    /// <summary>The first failure, or null.</summary>
    public string? Failure => Runs.FirstOrDefault(static r => r.Outcome == RunOutcome.Failed)?.Text;
    /// <summary>Number of runs that moved the VM.</summary>
    public int CompletedRuns => Completed.Count();
    /// <summary>True if every run moved the VM.</summary>
    public bool Converges => Runs.Count > 0 && Runs.All(static r => r.Outcome == RunOutcome.Completed);
    /// <summary>Median of query-migrate's total-time.</summary>
    public double? MedianTotalMs => Median(static r => r.TotalMs);
    /// <summary>Median of the time from the command to the event.</summary>
    public double? MedianWallMs => Median(static r => r.WallMs);
    /// <summary>Median of the CPU time of both ends per GiB of RAM.</summary>
    public double? CpuSecondsPerGib => Median(r => r.CpuSeconds / Gib);
    /// <summary>Of it, the source's.</summary>
    public double? SourceCpuSecondsPerGib => Median(r => r.SourceCpuSeconds / Gib);
    /// <summary>Of it, the destination's.</summary>
    public double? DestinationCpuSecondsPerGib => Median(r => r.DestinationCpuSeconds / Gib);
    /// <summary>Median downtime.</summary>
    public double? MedianDowntimeMs => Median(static r => r.DowntimeMs);
    /// <summary>Longest downtime.</summary>
    public double? LongestDowntimeMs => Number(Statistics.Max(Completed.Select(static r => r.DowntimeMs)));
    /// <summary>Median of the measured dirty rates; null of a guest that writes nothing.</summary>
    public double? MedianDirtyMBps => Number(Statistics.Median(Runs.Where(static r => r.DirtyMBps is not null).Select(static r => r.DirtyMBps!.Value)));
    /// <summary>Median of the mean times of a pass.</summary>
    public double? MedianMsPerRound => Number(Statistics.Median(Runs.Where(static r => r.MsPerRound is not null).Select(static r => r.MsPerRound!.Value)));
    /// <summary>RAM over the median total time, 10^9 bytes a second.</summary>
    public double? GBps => MedianTotalMs is { } ms ? Gib * 1.073741824 / (ms / 1000) : null;

    private double? Median(Func<RunResult, double> of) => Number(Statistics.Median(Completed.Select(of)));

    private static double? Number(double value) => double.IsNaN(value) ? null : value;
}

/// <summary>The results of one scenario.</summary>
internal sealed record ScenarioResult(string Name, string Summary, int SizeMiB, Series Vmm, Series? Peer, double? LoopbackGBps)
{
    /// <summary>The peer's median total time over ours.</summary>
    public double? Ratio => Peer?.MedianTotalMs / Vmm.MedianTotalMs;
    /// <summary>The same of the wall time.</summary>
    public double? WallRatio => Peer?.MedianWallMs / Vmm.MedianWallMs;
    /// <summary>Our CPU time over the peer's.</summary>
    public double? CpuRatio => Vmm.CpuSecondsPerGib / Peer?.CpuSecondsPerGib;
    /// <summary>Our median downtime over the peer's.</summary>
    public double? DowntimeRatio => Vmm.MedianDowntimeMs / Peer?.MedianDowntimeMs;
    /// <summary>Our throughput in percent of the plain copy's.</summary>
    public double? LoopbackPercent => Vmm.GBps / LoopbackGBps * 100;
    /// <summary>Each condition that the scenario sets, with what was found.</summary>
    public required IReadOnlyList<Verdict> Verdicts { get; init; }

    /// <summary>Compares the figures with what the scenario must show.</summary>
    internal static ScenarioResult Of(Scenario scenario, int sizeMiB, Series vmm, Series? peer, double? loopback)
    {
        var result = new ScenarioResult(scenario.Name, scenario.Summary, sizeMiB, vmm, peer, loopback) { Verdicts = [] };
        Target t = scenario.Target;
        IEnumerable<Verdict?> all =
        [
            Verdict.AtLeast("ratio", result.Ratio, t.Ratio), Verdict.AtMost("CPU ratio", result.CpuRatio, t.CpuRatio),
            Verdict.AtLeast("% of loopback", result.LoopbackPercent, t.LoopbackPercent), Verdict.AtMost("median downtime, ms", vmm.MedianDowntimeMs, t.MedianDowntimeMs),
            Verdict.AtMost("longest downtime, ms", vmm.LongestDowntimeMs, t.LongestDowntimeMs), Verdict.AtMost("downtime ratio", result.DowntimeRatio, t.DowntimeRatio),
        ];
        return result with { Verdicts = [.. all.OfType<Verdict>()] };
    }
}

/// <summary>One condition and whether it holds; it does not where there is no figure.</summary>
internal sealed record Verdict(string What, double? Found, string Wanted, bool Holds)
{
    internal static Verdict? AtLeast(string what, double? found, double? limit) => limit is { } l ? new(what, found, $">= {l:0.##}", found >= l) : null;

    internal static Verdict? AtMost(string what, double? found, double? limit) => limit is { } l ? new(what, found, $"<= {l:0.##}", found <= l) : null;
}
