using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary>Formats an answer of query-migrate for people. Accepts QEMU's answers too, which have no breakdown of the downtime.</summary>
internal sealed record MigrationReport(JsonObject Answer)
{
    /// <summary>The member of query-migrate that vmm adds, with the parts of the downtime.</summary>
    public const string DowntimeMember = QmpServer.ExtensionPrefix + "downtime";

    /// <summary>The member of query-migrate that vmm adds, with what the switchover waits for.</summary>
    public const string SwitchoverMember = QmpServer.ExtensionPrefix + "switchover";

    private static readonly (string Key, string Label)[] s_parts =
    [
        ("device-stop-ms", "device stop"), ("final-ram-ms", "final RAM"), ("device-state-ms", "device state"), ("send-ms", "send"), ("load-ms", "load"), ("start-ms", "start"),
    ];

    public string Status => Answer.Text("status") ?? "none";

    public bool IsTerminal => Status is "none" or "completed" or "failed" or "cancelled";

    public string? Error => Answer.Text("error-desc");

    /// <summary>True if the destination could not be reached: vmm's error record says so, and for QEMU, which has no record, the text does.</summary>
    public bool IsUnreachable => Answer[QmpServer.ExtensionPrefix + "error"] is JsonObject error
        ? error.Text("phase") == "connect"
        : Error?.StartsWith("Failed to connect to", StringComparison.Ordinal) == true;

    public IReadOnlyList<string> BlockedReasons => Answer["blocked-reasons"] is JsonArray a ? [.. a.Select(static r => r?.ToString() ?? string.Empty)] : [];

    public double TotalMs => Answer.Number("total-time") ?? 0;

    public long Rounds => (long)(Ram("dirty-sync-count") ?? 0);

    public double Transferred => Ram("transferred") ?? 0;

    public double RamTotal => Ram("total") ?? 0;

    public double RamRemaining => Ram("remaining") ?? 0;

    /// <summary>Present rate in bytes a second, from QEMU's mbps.</summary>
    public double RateNow => (Ram("mbps") ?? 0) * 1e6 / 8;

    /// <summary>Average rate of the migration without its setup, in bytes a second.</summary>
    public double RateOverall
    {
        get
        {
            double ms = TotalMs - (Answer.Number("setup-time") ?? 0);
            return ms > 0 ? Transferred / ms * 1000 : RateNow;
        }
    }

    /// <summary>Time from stop to running, ms; with fractions if the breakdown gives them.</summary>
    public double? DowntimeMs => Breakdown.Number("total-ms") ?? Answer.Number("downtime");

    private JsonObject? Breakdown => Answer[DowntimeMember] as JsonObject;

    /// <summary>The summary as pairs of label and value.</summary>
    public IReadOnlyList<string[]> Lines()
    {
        var lines = new List<string[]> { new[] { "status", Status } };
        if (Error is { } error) lines.Add(["error", error]);
        if (Answer["ram"] is JsonObject)
        {
            lines.Add(["total time", Format.Milliseconds(TotalMs)]);
            lines.Add(["rounds", Rounds.ToString()]);
            lines.Add(["transferred", $"{Format.Size(Transferred)} of {Format.Size(RamTotal)} RAM ({Ram("normal") ?? 0:0} pages, {Ram("duplicate") ?? 0:0} zero pages)"]);
            if (!IsTerminal) lines.Add(["remaining", Format.Size(RamRemaining)]);
            lines.Add(["throughput", Format.Rate(IsTerminal ? RateOverall : RateNow)]);
        }
        if (DowntimeMs is { } downtime) lines.Add(["downtime", Format.Milliseconds(downtime) + Parts()]);
        foreach (string reason in BlockedReasons) lines.Add(["blocked", reason]);
        if (Answer["socket-address"] is JsonArray sockets)
            foreach (JsonNode? one in sockets) lines.Add(["listening", AddressExtensions.ReadSocketAddress(one).ToString()]);
        return lines;
    }

    /// <summary>The progress of a running migration in one line.</summary>
    public string ProgressLine() => Status switch
    {
        "active" or "device" or "pre-switchover" when Answer["ram"] is JsonObject =>
            $"{Status}: round {Math.Max(1, Rounds)}, {Format.Size(Transferred)} sent, {Format.Size(RamRemaining)} of {Format.Size(RamTotal)} left, "
            + $"{Format.Rate(RateNow)}, {Format.Milliseconds(TotalMs)}{Convergence()}",
        _ => Status,
    };

    /// <summary>What keeps the VM from moving; empty while it comes nearer to its end at full speed.</summary>
    private string Convergence()
    {
        string stalled = (Answer[SwitchoverMember] as JsonObject)?.Text("waits-for") == "stalled" ? ", does not converge" : string.Empty;
        return Answer.Number("cpu-throttle-percentage") is { } percent ? $"{stalled}, guest throttled by {percent:0} %" : stalled;
    }

    private string Parts()
    {
        if (Breakdown is not { } parts) return string.Empty;
        string text = string.Join(", ", s_parts.Where(p => parts.Number(p.Key) is > 0).Select(p => $"{p.Label} {Format.Milliseconds(parts.Number(p.Key)!.Value)}"));
        string drain = parts.Number("drain-ms") is { } ms and > 0 ? $"; drain before it {Format.Milliseconds(ms)}" : string.Empty;
        return text.Length > 0 ? $" ({text}{drain})" : drain;
    }

    private double? Ram(string key) => Answer["ram"].Number(key);
}
