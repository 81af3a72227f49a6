using System.Text.Json.Nodes;

namespace Vmm.Tests.Faults;

/// <summary>
/// How long each wait of an attempt may take. The runs set the parameters below, where the program has them, and the limits follow from these values;
/// the slack is for a machine that runs many processes on two cores.
/// </summary>
internal static class Deadlines
{
    /// <summary>Limits of the program as migration parameters, ms. The runs shorten them; one that the program does not have is left out.</summary>
    private static readonly (string Name, int Ms)[] s_parameters =
    [
        ("x-setup-timeout", PeerMs), ("x-progress-timeout", PeerMs), ("x-switchover-timeout", PeerMs), ("x-confirm-timeout", PeerMs), ("x-final-word-timeout", FinalWordMs),
    ];

    /// <summary>Longer than the longest stall that ends, so that only one without end is a failure.</summary>
    private const int PeerMs = 4000, FinalWordMs = 5000;

    /// <summary>What a machine under load adds to each wait.</summary>
    internal static readonly TimeSpan Slack = TimeSpan.FromSeconds(8);

    /// <summary>A side that has an error in hand, or whose peer ends in good order, settles within this time.</summary>
    private static readonly TimeSpan s_error = TimeSpan.FromSeconds(2);

    /// <summary>A side that hears nothing. One deadline may follow another: progress, then the answer to a cancel, then the final word.</summary>
    private static readonly TimeSpan s_silence = TimeSpan.FromMilliseconds(PeerMs + FinalWordMs);

    /// <summary>How long the source may take to settle after the fault, or after the beginning without one.</summary>
    internal static TimeSpan OfSource(AttemptPlan plan) => Slack + After(plan.Fault);

    /// <summary>How long the destination may take.</summary>
    internal static TimeSpan OfDestination(AttemptPlan plan) => Slack + TimeSpan.FromMilliseconds(FinalWordMs) + After(plan.Fault);

    /// <summary>Sets the parameters at one side.</summary>
    internal static async Task Set(FaultVm vm)
    {
        JsonObject? known = await vm.Ask("query-migrate-parameters") as JsonObject;
        var set = new JsonObject();
        foreach ((string name, int ms) in s_parameters)
            if (known?.ContainsKey(name) == true) set[name] = ms;
        if (set.Count > 0) await vm.Execute("migrate-set-parameters", set);
    }

    private static TimeSpan After(Fault fault) =>
        fault.IsSilent || fault.Action == FaultAction.HalfClose ? s_silence : s_error + TimeSpan.FromMilliseconds(fault.Ms) + TimeSpan.FromMilliseconds(fault.Bytes / 10.0);
}
