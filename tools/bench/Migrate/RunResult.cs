namespace Vmm.Tools.Bench.Migrate;

/// <summary>How a run ended.</summary>
internal enum RunOutcome
{
    /// <summary>The VM moved, and RAM is the same at both ends.</summary>
    Completed,
    /// <summary>The deadline passed, and the migration was cancelled.</summary>
    NotConverged,
    /// <summary>The program does not take a capability or parameter of the scenario.</summary>
    Refused,
    /// <summary>The migration failed, or RAM differs.</summary>
    Failed,
}

/// <summary>Figures of one run.</summary>
/// <param name="Outcome">How it ended.</param>
internal sealed record RunResult(RunOutcome Outcome)
{
    /// <summary>What was refused or went wrong.</summary>
    public string? Text { get; init; }
    /// <summary>query-migrate's total-time; up to the deadline if it did not converge.</summary>
    public double TotalMs { get; init; }
    /// <summary>From the command to the source's event.</summary>
    public double WallMs { get; init; }
    /// <summary>Downtime by the source's clock, until the destination has confirmed that it runs.</summary>
    public double DowntimeMs { get; init; }
    /// <summary>CPU time of the source during the migration.</summary>
    public double SourceCpuSeconds { get; init; }
    /// <summary>CPU time of the destination during the migration.</summary>
    public double DestinationCpuSeconds { get; init; }
    /// <summary>Measured rate at which the guest dirtied pages before the migration, 10^6 bytes a second; null of a guest that writes nothing.</summary>
    public double? DirtyMBps { get; init; }
    /// <summary>Passes over the dirty pages.</summary>
    public long Rounds { get; init; }
    /// <summary>Mean time of such a pass: all but setup and downtime over the number of passes.</summary>
    public double? MsPerRound => Rounds > 0 ? (TotalMs - SetupMs - DowntimeMs) / Rounds : null;
    /// <summary>query-migrate's setup-time.</summary>
    public double SetupMs { get; init; }

    /// <summary>CPU time of both ends.</summary>
    public double CpuSeconds => SourceCpuSeconds + DestinationCpuSeconds;
}
