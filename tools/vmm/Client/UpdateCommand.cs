using System.Diagnostics;
using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary><c>vmm update</c>: asks the VM's process to move the VM into a new one, and prints how long the guest was stopped.</summary>
internal sealed class UpdateCommand(CliContext context, VmTarget target)
{
    private static readonly TimeSpan s_again = TimeSpan.FromMilliseconds(100);

    /// <summary>The new program, or null for the VM's own.</summary>
    public string? Binary { get; init; }

    /// <summary>True lets the process replace itself instead of starting a second one.</summary>
    public bool Exec { get; init; }

    /// <summary>Time limit for the new process.</summary>
    public TimeSpan Timeout { get; init; }

    public bool Json { get; init; }

    /// <summary>
    /// Waits until the VM runs again, by its entry in the VM directory: a process that replaces itself cannot answer. Ctrl-C comes too late for that.
    /// </summary>
    private async Task<JsonNode> FindAgain(VmDirectory directory, int pid, long asked)
    {
        using var watch = new DirectoryWatch(directory.DirectoryPath);
        using var limit = new CancellationTokenSource(Timeout);
        try
        {
            while (true)
            {
                VmEntry entry = directory.FindPid(pid) ?? throw new CliException(ExitCode.Failed, $"update failed: process {pid} has ended, and the VM with it");
                if (entry.RunningAtNs > asked)
                    return new JsonObject { ["pid"] = pid, ["pause-ms"] = entry.PauseMs, ["total-ms"] = (entry.RunningAtNs - asked) / 1e6, ["bytes"] = 0 };
                await watch.WaitAsync(limit.Token);
            }
        }
        catch (OperationCanceledException e)
        {
            throw new CliException(ExitCode.Timeout, $"process {pid} has replaced itself and does not run the VM after {Timeout.TotalSeconds:0} s", e);
        }
    }

    public async Task<ExitCode> Run()
    {
        if (Timeout <= TimeSpan.Zero || Timeout.TotalMilliseconds > int.MaxValue) throw CliException.Usage("--timeout expects seconds, over 0");
        await using IMonitor monitor = await target.Connect(context, context.Interrupted);
        var arguments = new JsonObject { ["exec"] = Exec, ["timeout-ms"] = (int)Timeout.TotalMilliseconds };
        if (Binary is not null) arguments["binary"] = Path.GetFullPath(Binary);
        var directory = VmDirectory.Open(context.GetVariable);
        int pid = Exec ? target.Qmp is null ? directory.Resolve(target.Vm).Pid : throw CliException.Usage("--exec needs --vm: the VM is found again by name") : 0;
        await RefuseUnlessHere(monitor);
        JsonNode? result = await Move(monitor, arguments, directory, pid);
        if (context.Interrupted.IsCancellationRequested) context.Note("the update was complete before it could be cancelled");
        if (Json) Format.WriteJson(context.Out, (JsonObject)result!.DeepClone());
        else context.Out.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"updated: the VM runs in process {result.Number("pid"):0}; it was stopped for {result.Number("pause-ms"):0.0} ms, {result.Number("bytes"):0} bytes moved, {result.Number("total-ms"):0} ms in all"));
        return ExitCode.Ok;
    }

    /// <summary>Moves the VM. Ctrl-C asks the VM to cancel, and only the VM's answer says whether it moved.</summary>
    private async Task<JsonNode?> Move(IMonitor monitor, JsonObject arguments, VmDirectory directory, int pid)
    {
        long asked = Stopwatch.GetTimestamp(); // CLOCK_MONOTONIC in ns, as in the entry
        using var answered = new CancellationTokenSource();
        using CancellationTokenRegistration interrupt = context.Interrupted.Register(() => _ = KeepCancelling(monitor, answered.Token));
        try
        {
            return await monitor.Execute(QmpServer.ExtensionPrefix + "update", arguments, CancellationToken.None);
        }
        catch (CliException e) when (Exec && e.Code == ExitCode.Unreachable)
        {
            return await FindAgain(directory, pid, asked);
        }
        catch (MonitorException e) when (e.Message == "Operation canceled" && context.Interrupted.IsCancellationRequested)
        {
            throw new CliException(ExitCode.Cancelled, "update cancelled; the VM goes on in its old process", e);
        }
        finally
        {
            await answered.CancelAsync();
        }
    }

    /// <summary>Asks more than once, because the first request may overtake the update itself.</summary>
    private async Task KeepCancelling(IMonitor monitor, CancellationToken answered)
    {
        try
        {
            while (true)
            {
                await monitor.RequestOutOfBand(QmpServer.ExtensionPrefix + "update-cancel");
                await Task.Delay(s_again, context.Time, answered);
            }
        }
        catch (OperationCanceledException)
        {
            // The VM has answered.
        }
    }

    // The VM checks this again. Asking first gives a distinct exit code.
    private async Task RefuseUnlessHere(IMonitor monitor)
    {
        string? state = (await monitor.Query("query-status", context.Interrupted)).Text("status");
        if (state == "postmigrate") throw new CliException(ExitCode.Refused, "the VM has migrated away already, so there is nothing to move");
        if (state == "inmigrate") throw new CliException(ExitCode.Refused, "the VM waits for an incoming migration, so there is nothing to move yet");
    }
}
