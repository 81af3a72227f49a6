using System.Text.Json.Nodes;
using Vmm.Core.Memory;
using Vmm.Migration.Channels;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;

namespace Vmm.Migration.Qmp;

/// <summary>Converts migration figures and parameter values to QMP's JSON (qmp 8.6 and 8.7).</summary>
internal static class QmpMigrationInfo
{
    internal static JsonObject ToJson(MigrationInfo info)
    {
        var answer = new JsonObject();
        if (info.BlockedReasons.Count > 0) answer["blocked-reasons"] = Strings(info.BlockedReasons);
        if (info.Status == MigrationStatus.None) return answer;
        answer["status"] = info.Status.ToWireName();
        if (info.IsIncoming) AddIncoming(answer, info);
        else AddOutgoing(answer, info);
        if (info.Downtime is { } downtime) answer[QmpServer.ExtensionPrefix + "downtime"] = Downtime(downtime);
        if (info.SwitchoverWait is { } wait) answer[QmpServer.ExtensionPrefix + "switchover"] = Switchover(wait, info.PredictedDowntimeMs);
        if (info.Error is { } error && info.Status is MigrationStatus.Failed or MigrationStatus.Failing)
        {
            answer["error-desc"] = info.Error!.ToString();
            answer[QmpServer.ExtensionPrefix + "error"] = Error(info.Error);
        }
        return answer;
    }

    /// <summary>True while the migration transfers RAM or device state, so that its figures still change.</summary>
    internal static bool IsActive(MigrationStatus status) => status is MigrationStatus.Active or MigrationStatus.Cancelling
        or MigrationStatus.PreSwitchover or MigrationStatus.Device or MigrationStatus.PostcopyDevice or MigrationStatus.PostcopyActive
        or MigrationStatus.PostcopyPaused or MigrationStatus.PostcopyRecoverSetup or MigrationStatus.PostcopyRecover;

    /// <summary>Converts a parameter's JSON value to the type that the parameter table needs.</summary>
    internal static object ParameterValue(MigrationParameter parameter, JsonNode? value) => parameter.Kind switch
    {
        MigrationParameterKind.Bool => value!.GetValue<bool>(),
        MigrationParameterKind.Enum => value!.GetValue<string>(),
        MigrationParameterKind.StringOrNull => value?.GetValue<string>() ?? string.Empty,
        MigrationParameterKind.StringList => ((JsonArray)value!).Select(static s => s!.GetValue<string>()).ToArray(),
        _ => value!.GetValue<ulong>(),
    };

    /// <summary>Converts a parameter's value to JSON.</summary>
    internal static JsonNode ParameterJson(object value) => value switch
    {
        bool b => JsonValue.Create(b),
        ulong n => JsonValue.Create(n),
        string[] list => Strings(list),
        _ => JsonValue.Create((string)value),
    };

    private static void AddIncoming(JsonObject answer, MigrationInfo info)
    {
        if (info.Status == MigrationStatus.Completed || info.SocketAddresses.Count == 0) return;
        answer["socket-address"] = new JsonArray([.. info.SocketAddresses.Select(SocketAddress)]);
    }

    private static void AddOutgoing(JsonObject answer, MigrationInfo info)
    {
        bool active = IsActive(info.Status);
        if (!active && info.Status != MigrationStatus.Completed) return;
        answer["total-time"] = info.TotalTimeMs;
        answer["setup-time"] = info.SetupTimeMs;
        if (active && info.ExpectedDowntimeMs is { } expected) answer["expected-downtime"] = expected;
        if (info.DowntimeMs is { } downtime) answer["downtime"] = (long)Math.Round(downtime);
        if (active && info.RemainingBytes is { } remaining) answer["remaining"] = remaining;
        if (info.Ram is { } ram) answer["ram"] = Ram(ram, active);
        if (info.CpuThrottlePercent is { } percent) answer["cpu-throttle-percentage"] = percent;
        if (info.Xbzrle is { } xbzrle) answer["xbzrle-cache"] = Xbzrle(xbzrle);
        if (info.VfioTransferredBytes is { } vfio) answer["vfio"] = new JsonObject { ["transferred"] = vfio };
    }

    private static JsonObject Ram(RamStats ram, bool active) => new()
    {
        ["transferred"] = ram.TransferredBytes,
        ["remaining"] = active ? ram.RemainingBytes : 0,
        ["total"] = ram.TotalBytes,
        ["duplicate"] = ram.DuplicatePages,
        ["normal"] = ram.NormalPages,
        ["normal-bytes"] = ram.NormalPages * RamBlock.PageSize,
        ["dirty-pages-rate"] = active ? ram.DirtyPagesRate : 0,
        ["mbps"] = ram.Mbps,
        ["dirty-sync-count"] = ram.DirtySyncCount,
        ["postcopy-requests"] = 0,
        ["page-size"] = RamBlock.PageSize,
        ["multifd-bytes"] = ram.MultifdBytes,
        ["pages-per-second"] = ram.PagesPerSecond,
        ["precopy-bytes"] = ram.PrecopyBytes,
        ["downtime-bytes"] = ram.DowntimeBytes,
        ["postcopy-bytes"] = 0,
        ["dirty-sync-missed-zero-copy"] = 0,
    };

    private static JsonObject Switchover(string wait, double? predictedMs)
    {
        var answer = new JsonObject { ["waits-for"] = wait };
        if (predictedMs is { } ms) answer["predicted-downtime-ms"] = ms;
        return answer;
    }

    private static JsonObject Xbzrle(XbzrleStats xbzrle) => new()
    {
        ["cache-size"] = xbzrle.CacheSizeBytes,
        ["bytes"] = xbzrle.Bytes,
        ["pages"] = xbzrle.Pages,
        ["cache-miss"] = xbzrle.CacheMisses,
        ["cache-miss-rate"] = xbzrle.CacheMissRate,
        ["encoding-rate"] = xbzrle.EncodingRate,
        ["overflow"] = xbzrle.Overflows,
    };

    private static JsonObject Downtime(DowntimeReport d)
    {
        var answer = new JsonObject
        {
            ["drain-ms"] = d.DrainMs, ["device-stop-ms"] = d.DeviceStopMs, ["final-ram-ms"] = d.FinalRamMs, ["device-state-ms"] = d.DeviceStateMs,
            ["send-ms"] = d.SendMs, ["load-ms"] = d.LoadMs, ["start-ms"] = d.StartMs, ["total-ms"] = d.TotalMs,
        };
        if (d.GuestAtNs != 0) answer["guest-at-ns"] = d.GuestAtNs;
        return answer;
    }

    private static JsonObject Error(MigrationError e)
    {
        var error = new JsonObject { ["side"] = e.Side, ["phase"] = e.Phase, ["message"] = e.Message };
        if (e.Section is not null) error["section"] = e.Section;
        if (e.Offset is not null) error["offset"] = e.Offset;
        if (e.Expected is not null) error["expected"] = e.Expected;
        if (e.Found is not null) error["found"] = e.Found;
        if (e.Hint is not null) error["hint"] = e.Hint;
        return error;
    }

    private static JsonObject SocketAddress(MigrationAddress address)
    {
        if (address.Transport == MigrationTransport.Unix) return new JsonObject { ["path"] = address.Path, ["type"] = "unix" };
        bool v6 = address.Host.Contains(':', StringComparison.Ordinal);
        return new JsonObject { ["port"] = $"{address.Port}", [v6 ? "ipv6" : "ipv4"] = true, ["host"] = address.Host, ["type"] = "inet" };
    }

    private static JsonArray Strings(IEnumerable<string> values) => [.. values.Select(static v => JsonValue.Create(v))];
}
