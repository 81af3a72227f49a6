namespace Vmm.Tools.Bench.Migrate;

/// <summary>What follows from the runs of a group together.</summary>
internal static class Conclusions
{
    private const double ScalePercent = 10, DevicesMs = 20, RateAhead = 1.5;

    /// <summary>One line each.</summary>
    internal static IEnumerable<string> Of(IReadOnlyList<ScenarioResult> results)
    {
        foreach (ScenarioResult r in results)
        {
            if (r.Peer is { } peer && ResultTable.Problem(peer) is { } problem) yield return $"{r.Name}: {peer.Peer} {problem}";
            if (r.Vmm.MedianDirtyMBps is null) continue;
            string moved = $"{r.Vmm.CompletedRuns} of {r.Vmm.Runs.Count}{(r.Peer is { } p ? $" : {p.CompletedRuns} of {p.Runs.Count}" : "")}";
            yield return $"{r.Name}: dirtied before the migration {ResultTable.Both(r, static s => s.MedianDirtyMBps, "F0")} MB/s; moved {moved}";
        }
        foreach (string line in Scale(Group(results, "scale"))) yield return line;
        if (Group(results, "devices") is [var none, var many])
            yield return $"devices: {F(many.Vmm.MedianDowntimeMs - none.Vmm.MedianDowntimeMs)} ms more downtime with {many.Name[8..]} devices (wanted: at most {DevicesMs} ms)";
        if (Group(results, "sections") is [var few, var all])
            yield return $"sections: a round takes {F(few.Vmm.MedianMsPerRound)} ms without, {F(all.Vmm.MedianMsPerRound)} ms with {all.Name[9..]} (wanted: no more)";
        foreach (string line in Converge(Group(results, "converge"))) yield return line;
    }

    private static IEnumerable<string> Scale(ScenarioResult[] results)
    {
        foreach (Func<ScenarioResult, Series?> side in (Func<ScenarioResult, Series?>[])[static r => r.Vmm, static r => r.Peer])
        {
            double[] perGib = [.. results.Select(side).Where(static s => s?.MedianTotalMs is not null).Select(static s => s!.MedianTotalMs!.Value / s.Gib)];
            if (perGib.Length < 2) continue;
            string list = string.Join(", ", perGib.Select(static ms => ResultTable.F(ms, "F0")));
            yield return $"scale, {side(results[0])?.Peer}: {list} ms per GiB, {F(((perGib.Max() / perGib.Min()) - 1) * 100)} % apart (wanted: at most {ScalePercent} %)";
        }
    }

    private static IEnumerable<string> Converge(ScenarioResult[] results)
    {
        if (!Array.Exists(results, static r => r.Peer is not null)) yield break;
        ScenarioResult[] theirs = [.. results.Where(static r => r.Peer?.Converges == true)];
        int ours = results.Where(static r => r.Vmm.Converges).Select(Rate).DefaultIfEmpty(0).Max(), highest = theirs.Select(Rate).DefaultIfEmpty(0).Max();
        yield return $"converge: highest rate {ours} : {highest} MB/s (wanted: {highest * RateAhead})";
        string late = string.Join(", ", theirs.Where(static r => !r.Vmm.Converges || r.Vmm.MedianTotalMs > r.Peer!.MedianTotalMs).Select(static r => r.Name));
        yield return $"converge: takes longer than the peer, or does not converge, in: {(late.Length > 0 ? late : "none")} (wanted: none)";
    }

    private static int Rate(ScenarioResult result) => int.Parse(result.Name.AsSpan("converge-".Length), System.Globalization.CultureInfo.InvariantCulture);

    private static ScenarioResult[] Group(IReadOnlyList<ScenarioResult> results, string group) => [.. results.Where(r => r.Name.StartsWith(group + "-", StringComparison.Ordinal))];

    private static string F(double? value) => ResultTable.F(value, "F1");
}
