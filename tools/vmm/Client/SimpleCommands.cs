using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary>The commands that need only one or two QMP commands.</summary>
internal sealed class SimpleCommands(CliContext context, VmTarget target)
{
    private static readonly TimeSpan s_settle = TimeSpan.FromSeconds(30), s_poll = TimeSpan.FromMilliseconds(20);

    /// <summary><c>vmm status</c>.</summary>
    public async Task<ExitCode> Status(bool json)
    {
        await using IMonitor monitor = await Connect();
        JsonObject status = await monitor.Query("query-status", context.Interrupted);
        JsonObject name = await monitor.Query("query-name", context.Interrupted);
        JsonObject version = await monitor.Query("query-version", context.Interrupted);
        var report = new MigrationReport(await monitor.Query("query-migrate", context.Interrupted));
        JsonObject[] lost = await LostDevices(monitor);
        if (json)
        {
            Format.WriteJson(context.Out, new JsonObject
            {
                ["name"] = name.Text("name"), ["status"] = status.Text("status"), ["running"] = status["running"]?.DeepClone(), ["held"] = status["x-held"]?.DeepClone(),
                ["version"] = version.DeepClone(), ["migration"] = report.Answer.DeepClone(),
                ["lost-devices"] = new JsonArray([.. lost.Select(static d => d.DeepClone())]),
            });
            return ExitCode.Ok;
        }
        var rows = new List<string[]>();
        if (name.Text("name") is { } n) rows.Add(["name", n]);
        rows.Add(["state", status.Text("status") ?? "unknown"]);
        if (status.Text("x-held") is { } held) rows.Add(["held", held]);
        rows.Add(["version", $"{version.Text("package")} (QMP {version["qemu"]?["major"]}.{version["qemu"]?["minor"]}.{version["qemu"]?["micro"]})"]);
        rows.AddRange(lost.Select(static d => (string[])["lost device", $"{d.Text("id")}: {d.Text("reason")}"]));
        if (report.Status != "none") rows.AddRange(report.Lines().Select(static l => (string[])[l[0] == "status" ? "migration" : "  " + l[0], l[1]]));
        else rows.AddRange(report.BlockedReasons.Select(static r => (string[])["blocked", r]));
        Format.WriteTable(context.Out, rows);
        return ExitCode.Ok;
    }

    /// <summary>Empty for a QEMU, which has no such command.</summary>
    private async Task<JsonObject[]> LostDevices(IMonitor monitor)
    {
        try
        {
            JsonNode? all = await monitor.Execute(QmpServer.ExtensionPrefix + "query-devices", null, context.Interrupted);
            return all is JsonArray devices ? [.. devices.OfType<JsonObject>().Where(static d => d.Text("state") == "lost")] : [];
        }
        catch (MonitorException)
        {
            return [];
        }
    }

    /// <summary><c>vmm stop</c>.</summary>
    public async Task<ExitCode> Stop()
    {
        await using IMonitor monitor = await Connect();
        await monitor.Execute("stop", null, context.Interrupted);
        return ExitCode.Ok;
    }

    /// <summary><c>vmm cont</c>: starts the guest, or continues a migration that waits before its switchover.</summary>
    public async Task<ExitCode> Cont(bool force = false)
    {
        await using IMonitor monitor = await Connect();
        bool waits = new MigrationReport(await monitor.Query("query-migrate", context.Interrupted)).Status == "pre-switchover";
        await Refusable(() => waits
            ? monitor.Execute("migrate-continue", new JsonObject { ["state"] = "pre-switchover" }, context.Interrupted)
            : monitor.Execute("cont", force ? new JsonObject { ["x-force"] = true } : null, context.Interrupted));
        return ExitCode.Ok;
    }

    /// <summary><c>vmm cancel</c>: returns when the migration has settled.</summary>
    public async Task<ExitCode> Cancel()
    {
        await using IMonitor monitor = await Connect();
        bool wasRunning = !new MigrationReport(await monitor.Query("query-migrate", context.Interrupted)).IsTerminal;
        await Refusable(() => monitor.Execute("migrate_cancel", null, context.Interrupted));
        if (!wasRunning)
        {
            context.Note("no migration runs");
            return ExitCode.Ok;
        }
        DateTimeOffset end = context.Time.GetUtcNow() + s_settle;
        while (true)
        {
            var report = new MigrationReport(await monitor.Query("query-migrate", context.Interrupted));
            if (report.Status == "completed") throw new CliException(ExitCode.Refused, "the migration was complete before it could be cancelled");
            if (report.IsTerminal) return ExitCode.Ok;
            if (context.Time.GetUtcNow() > end) throw new CliException(ExitCode.Timeout, $"the migration is still '{report.Status}' after {s_settle.TotalSeconds:0} s");
            // Poll, because a VM sends migration events only if the capability was on when the migration started.
            await Task.Delay(s_poll, context.Time, context.Interrupted);
        }
    }

    /// <summary><c>vmm quit</c>: returns when the VM has closed its socket.</summary>
    public async Task<ExitCode> Quit()
    {
        await using IMonitor monitor = await Connect();
        try
        {
            await monitor.Execute("quit", null, context.Interrupted);
        }
        catch (CliException e) when (e.Code == ExitCode.Unreachable)
        {
            // A VM may close the socket before it has sent the answer (qmp 7). Either way it has ended.
        }
        await monitor.WaitForEnd(s_settle);
        return ExitCode.Ok;
    }

    /// <summary><c>vmm list</c>.</summary>
    public static async Task<ExitCode> List(CliContext context, bool json)
    {
        IReadOnlyList<VmEntry> all = VmDirectory.Open(context.GetVariable).List();
        var states = await Task.WhenAll(all.Select(e => StateOf(context, e)));
        if (json)
        {
            Format.WriteJson(context.Out, new JsonArray([.. all.Select((e, i) => new JsonObject
            {
                ["name"] = e.Name, ["pid"] = e.Pid, ["status"] = states[i].Status, ["migration"] = states[i].Migration, ["memory"] = e.MemoryBytes, ["qmp"] = e.QmpPath,
            })]));
            return ExitCode.Ok;
        }
        if (all.Count == 0)
        {
            context.Note("no VM runs");
            return ExitCode.Ok;
        }
        List<string[]> rows = [["NAME", "PID", "STATE", "MIGRATION", "MEMORY", "QMP"]];
        rows.AddRange(all.Select((e, i) => (string[])[e.Name ?? "-", e.Pid.ToString(), states[i].Status, states[i].Migration, Format.Size(e.MemoryBytes), e.QmpPath]));
        Format.WriteTable(context.Out, rows);
        return ExitCode.Ok;
    }

    private static async Task<(string Status, string Migration)> StateOf(CliContext context, VmEntry entry)
    {
        try
        {
            await using IMonitor monitor = await context.Connect(entry.QmpPath, context.Interrupted);
            string status = (await monitor.Query("query-status", context.Interrupted)).Text("status") ?? "unknown";
            return (status, new MigrationReport(await monitor.Query("query-migrate", context.Interrupted)).Status);
        }
        catch (CliException e)
        {
            // One VM that does not answer must not hide the others.
            context.Note($"{entry.Key}: {e.Message}");
            return ("unreachable", "-");
        }
    }

    private static async Task Refusable(Func<Task<JsonNode?>> command)
    {
        try
        {
            await command();
        }
        catch (MonitorException e)
        {
            throw new CliException(ExitCode.Refused, e.Message, e);
        }
    }

    private Task<IMonitor> Connect() => target.Connect(context, context.Interrupted);
}
