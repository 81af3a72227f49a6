using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Typed reads of QMP answers.</summary>
internal static class MonitorExtensions
{
    public static async Task<JsonObject> Query(this IMonitor monitor, string command, CancellationToken cancel) =>
        await monitor.Execute(command, null, cancel) as JsonObject ?? [];

    public static string? Text(this JsonNode? node, string key) => node?[key] is JsonValue v && v.TryGetValue(out string? s) ? s : null;

    public static double? Number(this JsonNode? node, string key) =>
        node?[key] is not JsonValue v ? null : v.TryGetValue(out double d) ? d : v.TryGetValue(out long n) ? n : v.TryGetValue(out int i) ? i : null;
}
