using System.Text.Json.Nodes;
using Vmm.Migration.Channels;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Migrate;

/// <summary><c>vmm migrate</c>: checks the VM, sets capabilities and parameters, starts the migration, follows it, and prints a summary.</summary>
internal sealed class MigrateCommand(CliContext context, MigrateOptions options, VmTarget target)
{
    /// <summary>True returns once the migration has started.</summary>
    public bool Detach { get; init; }

    /// <summary>True only checks whether the migration could start.</summary>
    public bool CheckOnly { get; init; }

    public bool Json { get; init; }

    public async Task<ExitCode> Run()
    {
        await using IMonitor monitor = await target.Connect(context, context.Interrupted);
        return await Run(monitor);
    }

    /// <summary>As <see cref="Run()"/>, over a session that the caller keeps.</summary>
    public async Task<ExitCode> Run(IMonitor monitor)
    {
        JsonObject parameters = options.ParameterArguments(await monitor.Query("query-migrate-parameters", context.Interrupted));
        var known = await monitor.Execute("query-migrate-capabilities", null, context.Interrupted) as JsonArray ?? [];
        JsonObject capabilities = options.CapabilityArguments(known);
        await RefuseUnlessReady(monitor);
        if (CheckOnly) return await Check(monitor, known, capabilities, parameters);
        await Apply(monitor, "migrate-set-capabilities", capabilities);
        if (parameters.Count > 0) await Apply(monitor, "migrate-set-parameters", parameters);
        await Start(monitor);
        if (Detach)
        {
            var report = new MigrationReport(await monitor.Query("query-migrate", CancellationToken.None));
            if (Json) Format.WriteJson(context.Out, report.Answer);
            else context.Out.WriteLine($"started; 'vmm status' shows how it goes");
            return ExitCode.Ok;
        }
        return await FollowToEnd(monitor);
    }

    private async Task<ExitCode> FollowToEnd(IMonitor monitor)
    {
        MigrateFollower.Outcome outcome;
        using (var view = new ProgressView(context)) outcome = await MigrateFollower.Follow(context, monitor, view, options.Timeout);
        if (Json) Format.WriteJson(context.Out, outcome.Report.Answer);
        else if (outcome.Code == ExitCode.Ok) Format.WriteTable(context.Out, [.. outcome.Report.Lines()]);
        switch (outcome.Code)
        {
            case ExitCode.Ok:
                if (context.Interrupted.IsCancellationRequested) context.Note("the migration was complete before it could be cancelled");
                break;
            case ExitCode.Failed or ExitCode.Unreachable:
                context.Note($"migration {outcome.Report.Status}: {outcome.Report.Error ?? "the VM gives no reason"}");
                break;
            case ExitCode.Timeout:
                context.Note($"migration cancelled: not complete after {options.Timeout!.Value.TotalSeconds:0.###} s (--timeout); the VM goes on here");
                break;
            default:
                context.Note("migration cancelled; the VM goes on here");
                break;
        }
        return outcome.Code;
    }

    // The VM checks all this again when the migration starts. Asking first gives a distinct exit code, whatever text the VM uses.
    private async Task RefuseUnlessReady(IMonitor monitor)
    {
        string state = (await monitor.Query("query-status", context.Interrupted)).Text("status") ?? "unknown";
        var report = new MigrationReport(await monitor.Query("query-migrate", context.Interrupted));
        if (state == "inmigrate") throw Refused("the VM itself waits for an incoming migration");
        if (!report.IsTerminal) throw Refused($"another migration runs, status '{report.Status}'", "'vmm cancel' cancels it");
        if (state == "postmigrate") throw Refused("the VM has migrated away already", "'vmm cont' starts it here again");
        if (report.BlockedReasons.Count > 0) throw Refused($"blocked: {string.Join("; ", report.BlockedReasons)}");
    }

    private async Task<ExitCode> Check(IMonitor monitor, JsonArray known, JsonObject capabilities, JsonObject parameters)
    {
        // Only the VM can judge the settings as a whole, and only when they are set. So set them, and restore the old ones.
        await SetAndRestore(monitor, "migrate-set-capabilities", capabilities, new JsonObject { ["capabilities"] = known.DeepClone() });
        if (parameters.Count > 0)
        {
            JsonObject before = await monitor.Query("query-migrate-parameters", CancellationToken.None);
            var restore = new JsonObject(parameters.Select(p => KeyValuePair.Create(p.Key, before[p.Key]?.DeepClone())));
            await SetAndRestore(monitor, "migrate-set-parameters", parameters, restore);
        }
        if (options.Address.Transport == MigrationTransport.File && Path.GetDirectoryName(options.Address.Path) is { } folder && !Directory.Exists(folder))
            throw Refused($"--to '{options.Uri}': directory '{folder}' does not exist");
        if (Json) Format.WriteJson(context.Out, new JsonObject { ["ok"] = true, ["uri"] = options.Uri });
        else context.Out.WriteLine($"ok: this VM can migrate to {options.Uri}");
        return ExitCode.Ok;
    }

    private static async Task SetAndRestore(IMonitor monitor, string command, JsonObject wanted, JsonObject before)
    {
        await Apply(monitor, command, wanted);
        await Apply(monitor, command, before);
    }

    private static async Task Apply(IMonitor monitor, string command, JsonObject arguments)
    {
        try
        {
            await monitor.Execute(command, arguments, CancellationToken.None);
        }
        catch (MonitorException e) when (command == "migrate-set-parameters")
        {
            throw CliException.Usage($"--set: {e.Message}");
        }
        catch (MonitorException e)
        {
            throw Refused(e.Message);
        }
    }

    private async Task Start(IMonitor monitor)
    {
        try
        {
            await monitor.Execute("migrate", new JsonObject { ["uri"] = options.Uri }, CancellationToken.None);
        }
        catch (MonitorException e) when (Refusals.Any(r => e.Message.Contains(r, StringComparison.Ordinal)))
        {
            throw Refused(e.Message);
        }
        catch (MonitorException e)
        {
            throw new CliException(ExitCode.Failed, $"migration to '{options.Uri}' failed: {e.Message}", e);
        }
    }

    // QEMU's texts for a VM whose state changed after the check.
    private static readonly string[] Refusals = ["migration process in progress", "waiting for an incoming migration", "was paused due to previous migration"];

    private static CliException Refused(string why, string? hint = null) => new(ExitCode.Refused, $"migration refused: {why}") { Hint = hint };
}
