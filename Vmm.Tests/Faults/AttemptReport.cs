using System.Globalization;

namespace Vmm.Tests.Faults;

/// <summary>How an attempt ended.</summary>
internal enum Outcome
{
    /// <summary>Moved, and running at the destination or in the new process.</summary>
    Moved,
    /// <summary>Still at the source, and running.</summary>
    Stayed,
    /// <summary>The source has let go, and the destination held the VM until an operator started it with force.</summary>
    Forced,
    /// <summary>The destination was killed after the source had let go; an operator started the VM at the source again.</summary>
    TakenBack,
    /// <summary>The fault killed the only process that had the VM.</summary>
    Killed,
    /// <summary>A snapshot was saved or loaded.</summary>
    Done,
    /// <summary>A snapshot failed, and the VM is as it was.</summary>
    Refused,
    /// <summary>Nobody can run the VM, or its guest is not what it was.</summary>
    Lost,
}

/// <summary>What an attempt showed.</summary>
internal sealed class AttemptReport(AttemptPlan plan)
{
    private readonly List<string> _failures = [];

    internal AttemptPlan Plan => plan;

    internal Outcome Outcome { get; set; } = Outcome.Lost;

    /// <summary>True if the stream came to the fault's place.</summary>
    internal bool FaultHappened { get; set; }

    /// <summary>From the fault, or from the beginning without one, until the source was settled.</summary>
    internal TimeSpan SourceTime { get; set; }

    /// <summary>The same for the destination.</summary>
    internal TimeSpan DestinationTime { get; set; }

    internal TimeSpan Total { get; set; }

    /// <summary>The logs of both sides, kept for a failure.</summary>
    internal string Logs { get; set; } = "";

    internal IReadOnlyList<string> Failures => _failures;

    internal void Fail(string what) => _failures.Add(what);

    internal void FailIf(string? what)
    {
        if (what is not null) Fail(what);
    }

    public override string ToString() => string.Create(CultureInfo.InvariantCulture,
        $"{plan}{(FaultHappened || plan.Fault.Action == FaultAction.None ? "" : " (not reached)")}: {Outcome}, source {SourceTime.TotalSeconds:0.00} s, destination {DestinationTime.TotalSeconds:0.00} s, {Total.TotalSeconds:0.00} s in all")
        + string.Concat(_failures.Select(static f => $"\n    FAILED: {f}"));
}
