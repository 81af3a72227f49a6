using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>One migration between two processes of the same program.</summary>
internal static class MigrationRun
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(60), s_look = TimeSpan.FromMilliseconds(20);

    /// <summary>Measures one migration.</summary>
    /// <param name="peer">The program.</param>
    /// <param name="scenario">What is measured.</param>
    /// <param name="from">RAM of the source, with its content.</param>
    /// <param name="to">RAM of the destination, which is zeroed first.</param>
    /// <param name="samples">Receives what query-migrate says every 20 ms; null asks nothing while the migration runs.</param>
    internal static RunResult Measure(Peer peer, Scenario scenario, RamFile from, RamFile to, List<Sample>? samples = null)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-bench-");
        to.Clear();
        // A guest that wrote has changed the content; and what vmm's workload finds from another program's guest it takes for an error.
        if (scenario.WriterMBps > 0) from.Fill(scenario.Content);
        try
        {
            RunResult result = Measure(peer, scenario, from, to, folder.FullName, samples);
            if (result.Outcome != RunOutcome.Completed) return result;
            return RamFile.FirstDifference(from, to) is { } page ? result with { Outcome = RunOutcome.Failed, Text = $"RAM differs from page {page} on" } : result;
        }
        catch (QmpErrorException e)
        {
            return new RunResult(RunOutcome.Refused) { Text = e.Message };
        }
        catch (Exception e) when (e is ChannelException or InvalidOperationException or TimeoutException or IOException or AggregateException)
        {
            return new RunResult(RunOutcome.Failed) { Text = e.Message };
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static RunResult Measure(Peer peer, Scenario scenario, RamFile from, RamFile to, string folder, List<Sample>? samples)
    {
        using End destination = End.Start(peer, scenario, to, folder, isIncoming: true);
        using End source = End.Start(peer, scenario, from, folder, isIncoming: false);
        destination.Configure(scenario);
        source.Configure(scenario);
        double? dirty = null;
        if (scenario.WriterMBps > 0)
        {
            source.WaitForWriter();
            dirty = source.DirtyMBps();
        }
        string address = destination.Listen();
        (double sourceCpu, double destinationCpu) = (source.CpuSeconds, destination.CpuSeconds);
        using var end = new CancellationTokenSource();
        Task<QmpEvent> ended = source.Qmp.WaitForEventAsync("MIGRATION", static e => e.Data["status"]?.ToString() is "completed" or "failed" or "cancelled", end.Token);
        Task<QmpEvent> arrived = destination.Qmp.WaitForEventAsync("MIGRATION", static e => e.Data["status"]?.ToString() is "completed" or "failed", end.Token);
        try
        {
            long start = Stopwatch.GetTimestamp();
            source.Qmp.Execute("migrate", new JsonObject { ["uri"] = address });
            Watch(source, ended, scenario, start, samples);
            double wallMs = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
            // QEMU's destination ends with a migration that is cancelled.
            RunResult cpu = new(RunOutcome.Completed) { SourceCpuSeconds = source.CpuSeconds - sourceCpu, DestinationCpuSeconds = destination.CpuSeconds - destinationCpu };
            RunResult? other = ended.IsCompleted ? null : Cancel(source, ended);
            if (other is null && ended.Result.Data["status"]!.ToString() == "completed")
            {
                arrived.WaitAsync(s_patience).Wait();
                cpu = cpu with { SourceCpuSeconds = source.CpuSeconds - sourceCpu, DestinationCpuSeconds = destination.CpuSeconds - destinationCpu };
            }
            JsonNode info = source.Qmp.Execute("query-migrate")!;
            if (other is null && info["status"]!.ToString() != "completed")
                other = new RunResult(RunOutcome.Failed) { Text = $"the migration ended as {info["status"]}: {info["error-desc"]} {destination.Errors}" };
            return (other ?? Completed(info)) with
            {
                WallMs = wallMs, DirtyMBps = dirty, SourceCpuSeconds = cpu.SourceCpuSeconds, DestinationCpuSeconds = cpu.DestinationCpuSeconds,
            };
        }
        finally
        {
            end.Cancel();
        }
    }

    /// <summary>Waits for the end, at most to the deadline, and looks at the figures meanwhile if there are samples to take.</summary>
    private static void Watch(End source, Task ended, Scenario scenario, long start, List<Sample>? samples)
    {
        TimeSpan deadline = TimeSpan.FromSeconds(scenario.DeadlineSeconds);
        for (TimeSpan at; (at = Stopwatch.GetElapsedTime(start)) < deadline;)
        {
            TimeSpan rest = deadline - at;
            if (WaitFor(ended, samples is null || rest < s_look ? rest : s_look) || samples is null) return;
            JsonNode info = source.Qmp.Execute("query-migrate")!;
            if (info["ram"] is { } ram && info["total-time"] is { } time)
                samples.Add(new Sample(time.GetValue<long>(), ram["transferred"]!.GetValue<long>(), ram["remaining"]!.GetValue<long>()));
        }
    }

    private static bool WaitFor(Task task, TimeSpan time) => Task.WaitAny([task], time) == 0;

    private static RunResult? Cancel(End source, Task<QmpEvent> ended)
    {
        JsonNode info = source.Qmp.Execute("query-migrate")!;
        source.Qmp.Execute("migrate_cancel");
        // It may have switched over just then.
        if (ended.WaitAsync(s_patience).Result.Data["status"]!.ToString() == "completed") return null;
        return new RunResult(RunOutcome.NotConverged) { TotalMs = info["total-time"]!.GetValue<long>(), SetupMs = Setup(info), Rounds = Rounds(info) };
    }

    private static RunResult Completed(JsonNode info) => new(RunOutcome.Completed)
    {
        TotalMs = info["total-time"]!.GetValue<long>(), DowntimeMs = Downtime(info), SetupMs = Setup(info), Rounds = Rounds(info),
    };

    private static double Setup(JsonNode info) => info["setup-time"]?.GetValue<long>() ?? 0;

    private static long Rounds(JsonNode info) => info["ram"]?["dirty-sync-count"]?.GetValue<long>() ?? 0;

    // QEMU rounds its figure to ms; vmm also has the exact one.
    private static double Downtime(JsonNode info) => info[QmpServer.ExtensionPrefix + "downtime"]?["total-ms"]?.GetValue<double>() ?? info["downtime"]!.GetValue<long>();
}
