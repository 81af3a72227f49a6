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
    /// <summary>The new program, or null for the VM's own.</summary>
    public string? Binary { get; init; }

    /// <summary>True lets the process replace itself instead of starting a second one.</summary>
    public bool Exec { get; init; }

    /// <summary>Time limit for the new process.</summary>
    public TimeSpan Timeout { get; init; }

    public bool Json { get; init; }

    /// <summary>Waits until the VM runs again, by its entry in the VM directory: a process that replaces itself cannot answer.</summary>
    private async Task<JsonNode> FindAgain(VmDirectory directory, int pid, long asked)
    {
        using var watch = new DirectoryWatch(directory.DirectoryPath);
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(context.Interrupted);
        limit.CancelAfter(Timeout);
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
        catch (OperationCanceledException e) when (!context.Interrupted.IsCancellationRequested)
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
        long asked = Stopwatch.GetTimestamp(); // CLOCK_MONOTONIC in ns, as in the entry
        JsonNode? result;
        try
        {
            result = await monitor.Execute(QmpServer.ExtensionPrefix + "update", arguments, context.Interrupted);
        }
        catch (CliException e) when (Exec && e.Code == ExitCode.Unreachable)
        {
            result = await FindAgain(directory, pid, asked);
        }
        if (Json) Format.WriteJson(context.Out, (JsonObject)result!.DeepClone());
        else context.Out.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"updated: the VM runs in process {result.Number("pid"):0}; it was stopped for {result.Number("pause-ms"):0.0} ms, {result.Number("bytes"):0} bytes moved, {result.Number("total-ms"):0} ms in all"));
        return ExitCode.Ok;
    }
}
