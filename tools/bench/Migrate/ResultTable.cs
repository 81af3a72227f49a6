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

    /// <summary>Why a series has no figures to show, or null.</summary>
    internal static string? Problem(Series series) => series.Refused is { } refused ? $"refused: {refused}" : series.Failure is { } failure ? $"failed: {failure}" : null;

    private static string Verdict(ScenarioResult r) => r.Verdicts.Count == 0 ? ""
        : string.Join('\n', r.Verdicts.Select(static v => v.Holds ? $"[green]{v.What} {v.Wanted}[/]" : $"[red]not {v.What} {v.Wanted}[/]"));

    /// <summary>A figure of ours : the peer's.</summary>
    internal static string Both(ScenarioResult r, Func<Series, double?> of, string format) => r.Peer is null ? F(of(r.Vmm), format) : $"{F(of(r.Vmm), format)} : {F(of(r.Peer), format)}";

    /// <summary>A figure, or a dash.</summary>
    internal static string F(double? value, string format) => value?.ToString(format, CultureInfo.InvariantCulture) ?? "-";
}
