using System.Globalization;
using Spectre.Console;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>The results as text.</summary>
internal static class ResultTable
{
    /// <summary>One row for each scenario; figures of both programs stand as ours : the peer's.</summary>
    internal static Table Of(IReadOnlyList<ScenarioResult> results)
    {
        Table table = new Table().AddColumns("scenario", "total, s", "ratio", "wall, s", "GB/s", "loopback", "CPU s/GiB", "CPU ratio", "downtime, ms", "longest", "verdict");
        foreach (ScenarioResult r in results)
        {
            if (Problem(r.Vmm) is { } problem)
            {
                table.AddRow(r.Name, $"[red]vmm {Markup.Escape(problem)}[/]", "", "", "", "", "", "", "", "", "");
                continue;
            }
            table.AddRow(r.Name, Both(r, static s => s.MedianTotalMs / 1000, "F3"), F(r.Ratio, "F2"), Both(r, static s => s.MedianWallMs / 1000, "F3"), F(r.Vmm.GBps, "F2"),
                r.LoopbackGBps is null ? "" : $"{F(r.LoopbackGBps, "F2")} ({F(r.LoopbackPercent, "F0")} %)", Both(r, static s => s.CpuSecondsPerGib, "F2"), F(r.CpuRatio, "F2"),
                Both(r, static s => s.MedianDowntimeMs, "F1"), Both(r, static s => s.LongestDowntimeMs, "F1"), Verdict(r));
        }
        return table;
    }

    /// <summary>What follows from several scenarios together.</summary>
    internal static IEnumerable<string> Conclusions(IReadOnlyList<ScenarioResult> results)
    {
        foreach (ScenarioResult r in results.Where(static r => r.Vmm.MedianDirtyMBps is not null))
            yield return $"{r.Name}: dirtied before the migration {Both(r, static s => s.MedianDirtyMBps, "F0")} MB/s; moved {r.Vmm.CompletedRuns} of {r.Vmm.Runs.Count}"
                + (r.Peer is { } peer ? $" : {peer.CompletedRuns} of {peer.Runs.Count}{(Problem(peer) is { } p ? $" ({p})" : "")}" : "");
        if (Group(results, "scale") is { Length: > 1 } scale)
        {
            foreach (Func<ScenarioResult, Series?> side in (Func<ScenarioResult, Series?>[])[static r => r.Vmm, static r => r.Peer])
            {
                double[] perGib = [.. scale.Select(side).Where(static s => s?.MedianTotalMs is not null).Select(static s => s!.MedianTotalMs!.Value / s.Gib)];
                if (perGib.Length > 1) yield return $"scale, {side(scale[0])!.Peer}: {string.Join(", ", perGib.Select(static ms => F(ms, "F0")))} ms per GiB, {F(((perGib.Max() / perGib.Min()) - 1) * 100, "F0")} % apart";
            }
        }
        if (Group(results, "devices") is [var none, var many])
            yield return $"devices: {F(many.Vmm.MedianDowntimeMs - none.Vmm.MedianDowntimeMs, "F1")} ms more downtime with {many.Name[8..]} devices (wanted: at most 20)";
        if (Group(results, "sections") is [var few, var all])
            yield return $"sections: a round takes {F(few.Vmm.MedianMsPerRound, "F1")} ms without, {F(all.Vmm.MedianMsPerRound, "F1")} ms with {all.Name[9..]}";
        if (Group(results, "converge") is { Length: > 0 } converge)
            yield return $"converge: highest rate vmm {Highest(converge, static r => r.Vmm)}, {converge[0].Peer?.Peer ?? "no peer"} {Highest(converge, static r => r.Peer)} MB/s";
    }

    private static ScenarioResult[] Group(IReadOnlyList<ScenarioResult> results, string group) => [.. results.Where(r => r.Name.StartsWith(group + "-", StringComparison.Ordinal))];

    private static string Highest(ScenarioResult[] results, Func<ScenarioResult, Series?> side) => results.LastOrDefault(r => side(r)?.Converges == true)?.Name[9..] ?? "none";

    private static string? Problem(Series series) => series.Refused is { } refused ? $"refused: {refused}" : series.Failure is { } failure ? $"failed: {failure}" : null;

    private static string Verdict(ScenarioResult r) => r.Verdicts.Count == 0 ? ""
        : string.Join('\n', r.Verdicts.Select(static v => v.Holds ? $"[green]{v.What} {v.Wanted}[/]" : $"[red]not {v.What} {v.Wanted}[/]"));

    private static string Both(ScenarioResult r, Func<Series, double?> of, string format) => r.Peer is null ? F(of(r.Vmm), format) : $"{F(of(r.Vmm), format)} : {F(of(r.Peer), format)}";

    private static string F(double? value, string format) => value?.ToString(format, CultureInfo.InvariantCulture) ?? "-";
}
