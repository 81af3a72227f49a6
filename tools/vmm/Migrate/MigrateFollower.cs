using System.Diagnostics;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Migrate;

/// <summary>Follows an outgoing migration to its end. Cancels it on Ctrl-C or after a deadline, and then waits until it has ended.</summary>
internal static class MigrateFollower
{
    // No event brings the figures to show, so poll for them, and for the end too.
    private static readonly TimeSpan s_poll = TimeSpan.FromMilliseconds(100), s_settle = TimeSpan.FromSeconds(30);

    /// <summary>How a migration ended.</summary>
    /// <param name="Report">The last answer of query-migrate.</param>
    /// <param name="Code">The exit code that it means.</param>
    internal sealed record Outcome(MigrationReport Report, ExitCode Code);

    /// <summary>Polls until the status is terminal.</summary>
    public static async Task<Outcome> Follow(CliContext context, IMonitor monitor, ProgressView view, TimeSpan? timeout)
    {
        long start = Stopwatch.GetTimestamp();
        long? cancelledAt = null;
        ExitCode cancelCode = ExitCode.Cancelled;
        while (true)
        {
            // Ctrl-C must not cancel this query: it cancels the migration, whose end this loop still reports.
            var report = new MigrationReport(await monitor.Query("query-migrate", CancellationToken.None));
            if (report.IsTerminal) return new Outcome(report, Code(report, cancelledAt is null ? ExitCode.Failed : cancelCode));
            view.Show(report);
            bool late = timeout is { } limit && Stopwatch.GetElapsedTime(start) > limit;
            if (cancelledAt is null && (late || context.Interrupted.IsCancellationRequested))
            {
                cancelledAt = Stopwatch.GetTimestamp();
                if (late && !context.Interrupted.IsCancellationRequested) cancelCode = ExitCode.Timeout;
                await monitor.Execute("migrate_cancel", null, CancellationToken.None);
            }
            else if (cancelledAt is { } at && Stopwatch.GetElapsedTime(at) > s_settle)
            {
                throw new CliException(ExitCode.Timeout, $"the migration is still '{report.Status}' {s_settle.TotalSeconds:0} s after it was cancelled");
            }
            await Pause(context, cancelledAt is null);
        }
    }

    private static ExitCode Code(MigrationReport report, ExitCode whenCancelled) => report.Status switch
    {
        "completed" => ExitCode.Ok,
        "cancelled" => whenCancelled == ExitCode.Failed ? ExitCode.Cancelled : whenCancelled,
        _ => report.IsUnreachable ? ExitCode.Unreachable : ExitCode.Failed,
    };

    private static async Task Pause(CliContext context, bool wakeOnInterrupt)
    {
        try
        {
            await Task.Delay(s_poll, context.Time, wakeOnInterrupt ? context.Interrupted : CancellationToken.None);
        }
        catch (OperationCanceledException)
        {
            // Ctrl-C: the caller checks the token next.
        }
    }
}
