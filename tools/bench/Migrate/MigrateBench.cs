using System.Globalization;
using System.Text.Json;
using System.Text.Json.Serialization;
using Spectre.Console;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>What the command line sets.</summary>
internal sealed record MigrateBenchOptions
{
    /// <summary>Names of scenarios and groups.</summary>
    internal IReadOnlyList<string> Names { get; init; } = [];
    /// <summary>Number of pairs.</summary>
    internal int Pairs { get; init; }
    /// <summary>RAM in MiB of the scenarios that do not set it.</summary>
    internal int SizeMiB { get; init; }
    /// <summary>The measured program.</summary>
    internal required Peer Vmm { get; init; }
    /// <summary>What it is compared with; null without one.</summary>
    internal Peer? Peer { get; init; }
    /// <summary>File for the results, or null.</summary>
    internal string? JsonPath { get; init; }
    /// <summary>File for the drawing of one more run, or null.</summary>
    internal string? SvgPath { get; init; }
    /// <summary>Whether to compare with iperf3.</summary>
    internal bool HasLoopback { get; init; } = true;
}

/// <summary>Measures scenarios in pairs: each round runs vmm and then the peer.</summary>
internal static class MigrateBench
{
    private const int LoopbackRuns = 3;
    private static readonly JsonSerializerOptions s_json = new()
    {
        WriteIndented = true, PropertyNamingPolicy = JsonNamingPolicy.CamelCase, Converters = { new JsonStringEnumConverter(JsonNamingPolicy.CamelCase) },
        NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals,
    };

    internal static int Run(MigrateBenchOptions options)
    {
        IReadOnlyList<Scenario> scenarios;
        try
        {
            scenarios = Scenarios.Named(options.Names);
        }
        catch (ArgumentException e)
        {
            Console.Error.WriteLine($"bench: {e.Message}");
            return 2;
        }
        if (options.Peer is null) Note("no QEMU to compare with (set VMM_QEMU_111 or --peer)");
        var results = new List<ScenarioResult>();
        foreach (Scenario scenario in scenarios)
        {
            int sizeMiB = scenario.RamMiB(options.SizeMiB);
            if (Lacks(sizeMiB) is { } lack)
            {
                Note($"{scenario.Name}: left out, {lack}");
                continue;
            }
            results.Add(Measure(scenario, sizeMiB, options));
        }
        // A pipe has no width, and 80 columns would break every cell.
        if (Console.IsOutputRedirected) AnsiConsole.Profile.Width = 220;
        AnsiConsole.Write(ResultTable.Of(results));
        foreach (string line in Conclusions.Of(results)) Console.WriteLine(line);
        if (options.JsonPath is { } path)
        {
            var all = new { bench = "migrate", options.Pairs, vmm = options.Vmm.Path, peer = options.Peer?.Path, scenarios = results };
            File.WriteAllText(path, JsonSerializer.Serialize(all, s_json));
        }
        if (options.SvgPath is { } drawing) Draw(scenarios[0], options, drawing);
        return results.Exists(static r => r.Vmm.Failure is not null) ? 1 : 0;
    }

    private static ScenarioResult Measure(Scenario scenario, int sizeMiB, MigrateBenchOptions options)
    {
        using var from = new RamFile("from", sizeMiB);
        using var to = new RamFile("to", sizeMiB);
        from.Fill(scenario.Content);
        List<RunResult> ours = [], theirs = [];
        var loopback = new List<double>();
        bool measuresLoopback = options.HasLoopback && scenario is { Content: RamContent.Random, WriterMBps: 0, MaxBandwidthMBps: 0 };
        for (int i = 0; i < options.Pairs; i++)
        {
            // A program that refuses once refuses always.
            if (!Refuses(ours)) Add(ours, options.Vmm);
            if (options.Peer is { } peer && !scenario.IsVmmOnly && !Refuses(theirs)) Add(theirs, peer);
            if (!measuresLoopback || i >= LoopbackRuns) continue;
            if (Loopback.GBps(scenario.Streams) is { } rate) loopback.Add(rate);
            else
            {
                Note("no iperf3 to compare with (apt-get install iperf3)");
                measuresLoopback = false;
            }
        }
        double gib = sizeMiB / 1024.0;
        return ScenarioResult.Of(scenario, sizeMiB, new Series(options.Vmm.Name, gib, ours), theirs.Count == 0 ? null : new Series(options.Peer!.Name, gib, theirs),
            loopback.Count == 0 ? null : Statistics.Median(loopback));

        void Add(List<RunResult> list, Peer peer)
        {
            RunResult run = MigrationRun.Measure(peer, scenario, from, to);
            list.Add(run);
            Note($"{scenario.Name} {list.Count}/{options.Pairs} {peer.Name}: {Describe(run)}");
        }
    }

    private static bool Refuses(List<RunResult> runs) => runs is [{ Outcome: RunOutcome.Refused }, ..];

    /// <summary>Measures one more run of each program, with a look every 20 ms, and draws it.</summary>
    private static void Draw(Scenario scenario, MigrateBenchOptions options, string path)
    {
        int sizeMiB = scenario.RamMiB(options.SizeMiB);
        using var from = new RamFile("from", sizeMiB);
        using var to = new RamFile("to", sizeMiB);
        from.Fill(scenario.Content);
        var curves = new List<Curve>();
        foreach (Peer? peer in (Peer?[])[options.Vmm, scenario.IsVmmOnly ? null : options.Peer])
        {
            if (peer is null) continue;
            var samples = new List<Sample>();
            RunResult run = MigrationRun.Measure(peer, scenario, from, to, samples);
            Note($"{scenario.Name} with looks, {peer.Name}: {Describe(run)}, {samples.Count} looks");
            if (samples.Count > 0) curves.Add(new Curve(peer.Name, samples));
        }
        File.WriteAllText(path, LiveChart.Draw($"{scenario.Name}: {scenario.Summary}", curves));
    }

    private static string Describe(RunResult run) => run.Outcome switch
    {
        RunOutcome.Refused => $"refused: {run.Text}",
        RunOutcome.Failed => $"failed: {run.Text}",
        _ => string.Create(CultureInfo.InvariantCulture,
            $"{(run.Outcome == RunOutcome.NotConverged ? "did not converge in" : "total")} {run.TotalMs:F0} ms, wall {run.WallMs:F0} ms, downtime {run.DowntimeMs:F1} ms, ")
            + string.Create(CultureInfo.InvariantCulture, $"CPU {run.SourceCpuSeconds:F2} + {run.DestinationCpuSeconds:F2} s, {run.Rounds} rounds{(run.DirtyMBps is { } rate ? $", {rate:F0} MB/s dirtied" : "")}"),
    };

    /// <summary>Says how much memory a scenario lacks, or null: the RAM of both ends is in memory.</summary>
    private static string? Lacks(int sizeMiB)
    {
        string line = File.ReadLines("/proc/meminfo").First(static l => l.StartsWith("MemAvailable:", StringComparison.Ordinal));
        long availableMiB = long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) / 1024, neededMiB = (sizeMiB * 2L) + 512;
        return availableMiB >= neededMiB ? null : $"it needs {neededMiB} MiB of memory, {availableMiB} are available";
    }

    private static void Note(string text) => Console.Error.WriteLine($"bench: {text}");
}
