using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Update;

/// <summary>
/// One update into another process: starts the process, hands the VM over by cpr-transfer, and waits until the process runs the VM. After a failure
/// before the process has confirmed that it has the VM, this ends the process, and the VM continues here.
/// </summary>
internal sealed class TransferUpdate(IMigrationEngine engine, UpdateOptions options, UpdateFolder folder)
{
    /// <summary>Limit for the new process to report that it runs the VM, before which it does a few file operations.</summary>
    private static readonly TimeSpan s_takeOver = TimeSpan.FromSeconds(60);

    /// <summary>Limit for a failed process to exit, so that the message can give its exit code.</summary>
    private static readonly TimeSpan s_lastWord = TimeSpan.FromSeconds(2);

    internal async Task<UpdateResult> RunAsync(Func<Task> rehearse, CancellationToken limit)
    {
        long start = Stopwatch.GetTimestamp();
        var channels = new UpdateChannels(Environment.ProcessId, UpdateTicket.Unix(folder.Claim(".main")), UpdateTicket.Unix(folder.Claim(".cpr")));
        string reportPath = folder.Claim(".report");
        using var reports = new UpdateReports(reportPath);
        using NextProcess next = NextProcess.Start(options.Command(channels), new UpdateTicket { Channels = channels, ReportPath = reportPath });
        bool moved = false;
        try
        {
            // Rehearse while the new process starts, which takes longer.
            await rehearse().ConfigureAwait(false);
            if (await next.EndsBefore(reports.Listening, limit).ConfigureAwait(false) is { } early)
                throw new MigrationFailedException(Failed($"the new process ended with exit code {early} before it was ready"));
            MigrationInfo info = await HandOver(channels, next, limit).ConfigureAwait(false);
            moved = true;
            (int pid, long atNs) = await WaitUntilItRuns(reports, next).ConfigureAwait(false);
            double pauseMs = info.Downtime is { } stopped ? (atNs - stopped.AtNs) / 1e6 : 0;
            return new UpdateResult(pid, pauseMs, Stopwatch.GetElapsedTime(start).TotalMilliseconds, info.Ram?.TransferredBytes ?? 0);
        }
        finally
        {
            if (!moved) next.End();
            if (!moved || next.Exited.IsCompleted) options.Abandoned?.Invoke(next.Pid);
        }
    }

    /// <summary>The message of a failure that leaves the VM here.</summary>
    internal static string Failed(string reason) => $"update failed, the VM goes on in process {Environment.ProcessId}: {reason}";

    internal static string NotReady(UpdateOptions options) => $"the new process was not ready within {options.Timeout.TotalMilliseconds:0} ms";

    /// <summary>Moves the VM; returns the figures of the migration once the new process has the VM.</summary>
    /// <exception cref="MigrationFailedException">The move failed; the VM continues here.</exception>
    /// <exception cref="OperationCanceledException">The time limit has passed; the VM continues here.</exception>
    private async Task<MigrationInfo> HandOver(UpdateChannels channels, NextProcess next, CancellationToken limit)
    {
        using BorrowedSettings settings = BorrowedSettings.Take(engine, MigrationMode.CprTransfer, returnPath: true);
        Task<MigrationStatus> moving = engine.Migrate(channels.Main, channels.Cpr);
        using (limit.Register(engine.Cancel))
        {
            await Task.WhenAny(moving, next.Exited).ConfigureAwait(false);
            // A process that has ended cannot confirm the VM any more. The cancel has no effect on a completed migration.
            if (!moving.IsCompleted) engine.Cancel();
            if (await moving.ConfigureAwait(false) == MigrationStatus.Completed) return engine.Query();
        }
        throw new MigrationFailedException(Failed(await Reason(next, limit).ConfigureAwait(false)));
    }

    private static async Task<(int Pid, long AtNs)> WaitUntilItRuns(UpdateReports reports, NextProcess next)
    {
        using var limit = new CancellationTokenSource(s_takeOver);
        try
        {
            if (await next.EndsBefore(reports.Running, limit.Token).ConfigureAwait(false) is { } code)
                throw new MigrationFailedException($"update: the new process took the VM over and ended with exit code {code}");
        }
        catch (OperationCanceledException e)
        {
            throw new MigrationFailedException($"update: process {next.Pid} has the VM but did not report within {s_takeOver.TotalSeconds:0} s that it runs it", e);
        }
        return await reports.Running.ConfigureAwait(false);
    }

    private async Task<string> Reason(NextProcess next, CancellationToken limit)
    {
        // The new process's own error says most, its exit code less, and this side's error least.
        MigrationError? error = engine.Query().Error;
        if (error is { Side: "destination" }) return error.ToString();
        try
        {
            return $"the new process ended with exit code {await next.Exited.WaitAsync(s_lastWord, CancellationToken.None).ConfigureAwait(false)}";
        }
        catch (TimeoutException)
        {
            limit.ThrowIfCancellationRequested();
            return error?.ToString() ?? "the migration was cancelled";
        }
    }
}
