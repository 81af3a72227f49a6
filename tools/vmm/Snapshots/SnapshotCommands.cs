using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Snapshots;

/// <summary><c>vmm savevm</c>, <c>loadvm</c>, <c>delvm</c> and <c>snapshots</c>, over QMP's snapshot jobs.</summary>
internal sealed class SnapshotCommands(CliContext context, VmTarget target)
{
    /// <summary>Events report a job's changes; this slow poll covers a lost event.</summary>
    private static readonly TimeSpan s_lookAgain = TimeSpan.FromSeconds(1);

    public Task<ExitCode> Save(string name, bool json) => RunJob("snapshot-save", name, withState: true, "saved", json);

    public Task<ExitCode> Load(string name, bool json) => RunJob("snapshot-load", name, withState: true, "loaded", json);

    public async Task<ExitCode> Delete(string name, bool json)
    {
        await using (IMonitor monitor = await target.Connect(context, context.Interrupted))
        {
            // QEMU's delete succeeds for a name that does not exist, but a user who mistyped a name should get an error.
            if (!(await Rows(monitor)).Any(r => r.Name == name)) throw new CliException(ExitCode.Failed, $"snapshot '{name}' does not exist");
        }
        return await RunJob("snapshot-delete", name, withState: false, "deleted", json);
    }

    /// <summary>Lists snapshots from the table of the human monitor, because QMP has no structured list.</summary>
    public async Task<ExitCode> List(bool json)
    {
        await using IMonitor monitor = await target.Connect(context, context.Interrupted);
        IReadOnlyList<SnapshotRow> rows = await Rows(monitor);
        if (json)
        {
            Format.WriteJson(context.Out, new JsonArray([.. rows.Select(static r => new JsonObject
            {
                ["name"] = r.Name, ["size"] = r.Size, ["date"] = r.Date, ["vm-clock"] = r.VmClock,
            })]));
        }
        else if (rows.Count == 0)
        {
            context.Note("there are no snapshots");
        }
        else
        {
            Format.WriteTable(context.Out, [["NAME", "SIZE", "DATE", "VM CLOCK"], .. rows.Select(static r => (string[])[r.Name, r.Size, r.Date, r.VmClock])]);
        }
        return ExitCode.Ok;
    }

    private async Task<IReadOnlyList<SnapshotRow>> Rows(IMonitor monitor)
    {
        JsonNode? answer = await monitor.Execute("human-monitor-command", new JsonObject { ["command-line"] = "info snapshots" }, context.Interrupted);
        return SnapshotRow.Parse((answer?.ToString() ?? string.Empty).ReplaceLineEndings("\n"));
    }

    private async Task<ExitCode> RunJob(string command, string name, bool withState, string done, bool json)
    {
        if (name.Length == 0) throw CliException.Usage("the snapshot's name is empty");
        await using IMonitor monitor = await target.Connect(context, context.Interrupted);
        string id = $"cli-{Environment.ProcessId}-{Guid.NewGuid():N}";
        var arguments = new JsonObject { ["job-id"] = id, ["tag"] = name, ["devices"] = new JsonArray(QmpServer.SnapshotNodeName) };
        if (withState) arguments["vmstate"] = QmpServer.SnapshotNodeName;
        JsonObject job;
        try
        {
            await monitor.Execute(command, arguments, CancellationToken.None);
            job = await WaitForJob(monitor, id);
        }
        catch (MonitorException e)
        {
            throw new CliException(ExitCode.Failed, $"snapshot '{name}': {e.Message}", e);
        }
        bool cancelled = context.Interrupted.IsCancellationRequested;
        if (job.Text("error") is { } error)
        {
            if (cancelled && error == "Operation canceled") throw new CliException(ExitCode.Cancelled, $"snapshot '{name}': cancelled; the VM is unchanged");
            throw new CliException(ExitCode.Failed, $"snapshot '{name}': {error}");
        }
        if (json) Format.WriteJson(context.Out, new JsonObject { ["name"] = name, ["result"] = done });
        else context.Out.WriteLine($"snapshot '{name}' {done}");
        return ExitCode.Ok;
    }

    private async Task<JsonObject> WaitForJob(IMonitor monitor, string id)
    {
        bool cancelSent = false;
        while (true)
        {
            var jobs = await monitor.Execute("query-jobs", null, CancellationToken.None) as JsonArray ?? [];
            JsonObject job = jobs.OfType<JsonObject>().FirstOrDefault(j => j.Text("id") == id)
                ?? throw new CliException(ExitCode.Failed, $"the VM no longer knows job '{id}'");
            if (job.Text("status") == "concluded")
            {
                await monitor.Execute("job-dismiss", new JsonObject { ["id"] = id }, CancellationToken.None);
                return job;
            }
            if (context.Interrupted.IsCancellationRequested && !cancelSent)
            {
                cancelSent = true;
                await Cancel(monitor, id);
            }
            await WaitForChange(monitor, cancelSent);
        }
    }

    private static async Task Cancel(IMonitor monitor, string id)
    {
        try
        {
            await monitor.Execute("job-cancel", new JsonObject { ["id"] = id }, CancellationToken.None);
        }
        catch (MonitorException)
        {
            // The job has ended meanwhile; its last state says how.
        }
    }

    private async Task WaitForChange(IMonitor monitor, bool cancelSent)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancelSent ? CancellationToken.None : context.Interrupted);
        limit.CancelAfter(s_lookAgain);
        try
        {
            await monitor.WaitForEvent(limit.Token);
        }
        catch (OperationCanceledException)
        {
            // Ctrl-C, or the poll interval is over: the caller checks both next.
        }
    }
}
