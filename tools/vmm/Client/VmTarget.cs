using System.Text.Json.Nodes;
using Vmm.Tools.Cli.Hosting;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary>Which VM a command is for: <c>--vm N</c>, <c>--qmp PATH</c>, or the only one that runs.</summary>
internal sealed record VmTarget(string? Vm, string? Qmp)
{
    public async Task<IMonitor> Connect(CliContext context, CancellationToken cancel)
    {
        if (Vm is not null && Qmp is not null) throw CliException.Usage("--vm and --qmp exclude each other");
        string path = Qmp is not null ? RunOptions.SocketPath(Qmp) : VmDirectory.Open(context.GetVariable).Resolve(Vm).QmpPath;
        return await context.Connect(path, cancel);
    }
}

/// <summary>Typed reads of QMP answers.</summary>
internal static class MonitorExtensions
{
    public static async Task<JsonObject> Query(this IMonitor monitor, string command, CancellationToken cancel) =>
        await monitor.Execute(command, null, cancel) as JsonObject ?? [];

    public static string? Text(this JsonNode? node, string key) => node?[key] is JsonValue v && v.TryGetValue(out string? s) ? s : null;

    public static double? Number(this JsonNode? node, string key) =>
        node?[key] is not JsonValue v ? null : v.TryGetValue(out double d) ? d : v.TryGetValue(out long n) ? n : v.TryGetValue(out int i) ? i : null;
}
