using System.Collections.Concurrent;
using System.Diagnostics;
using System.Globalization;
using System.Text;

namespace Vmm.Tests.Faults;

/// <summary>Runs many attempts on a few lanes at a time and adds their reports up.</summary>
internal sealed class FaultRun
{
    private const int PerLane = 25;
    private readonly ConcurrentQueue<AttemptReport> _reports = new();
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private readonly TextWriter _progress;
    private readonly int _every;
    private int _count;

    /// <param name="progress">Gets each failure as it happens and a line now and then.</param>
    /// <param name="every">Attempts from one such line to the next.</param>
    internal FaultRun(TextWriter progress, int every) => (_progress, _every) = (progress, every);

    internal IReadOnlyCollection<AttemptReport> Reports => _reports;

    internal IEnumerable<AttemptReport> Failed => _reports.Where(static r => r.Failures.Count > 0);

    /// <summary>Runs attempts with seeds from <paramref name="seed"/> on.</summary>
    /// <param name="counts">How many of each kind.</param>
    /// <param name="seed">The first seed of each kind.</param>
    /// <param name="lanes">How many lanes run at a time.</param>
    /// <param name="ways">How many ways of listening there are; a short run has few, because each needs processes of its own.</param>
    internal async Task Run(IReadOnlyList<(AttemptKind Kind, int Count)> counts, int seed, int lanes, int ways = AttemptPlan.Ways)
    {
        var jobs = new List<(AttemptKind Kind, int[] Seeds)>();
        foreach ((AttemptKind kind, int count) in counts)
        {
            int[] seeds = [.. Enumerable.Range(0, int.MaxValue).Select(i => seed + i).Where(s => s % AttemptPlan.Ways < ways).Take(count)];
            foreach (IGrouping<int, int> way in seeds.GroupBy(s => IsListening(kind) ? s % AttemptPlan.Ways : 0)) jobs.AddRange(way.Chunk(Math.Clamp(count / lanes, 1, PerLane)).Select(s => (kind, s)));
        }
        // The kinds alternate, so that the long ones are not left for the end.
        var ordered = jobs.GroupBy(static j => j.Kind).SelectMany(static g => g.Select((j, i) => (Job: j, At: (double)i / g.Count()))).OrderBy(static x => x.At).Select(static x => x.Job);
        await Parallel.ForEachAsync(ordered, new ParallelOptions { MaxDegreeOfParallelism = lanes }, async (job, _) =>
        {
            await using var lane = new Lane(job.Kind, Take);
            foreach (int one in job.Seeds) await lane.Run(AttemptPlan.Of(job.Kind, one));
        });
    }

    private static bool IsListening(AttemptKind kind) => kind is AttemptKind.Plain or AttemptKind.Multifd or AttemptKind.Device;

    /// <summary>Notes a report.</summary>
    internal void Take(AttemptReport report)
    {
        _reports.Enqueue(report);
        int count = Interlocked.Increment(ref _count);
        if (report.Failures.Count > 0) _progress.WriteLine($"{report}\n{report.Logs}\n");
        if (count % _every == 0)
            _progress.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{count} attempts, {Failed.Count()} failed, {Stopwatch.GetElapsedTime(_startedAt).TotalSeconds:0} s"));
    }

    /// <summary>The totals, as the page docs/reliability.md gives them.</summary>
    internal string Totals()
    {
        var text = new StringBuilder();
        Outcome[] outcomes = [.. Enum.GetValues<Outcome>().Where(o => _reports.Any(r => r.Outcome == o))];
        text.AppendLine(CultureInfo.InvariantCulture, $"| kind | attempts | fault reached | {string.Join(" | ", outcomes.Select(static o => o.ToString().ToLowerInvariant()))} | failures | longest wait of the source, s | of the destination, s | s each |");
        text.AppendLine($"|{string.Concat(Enumerable.Repeat("---|", outcomes.Length + 7))}");
        foreach (IGrouping<string, AttemptReport> kind in _reports.GroupBy(static r => r.Plan.Kind.ToString().ToLowerInvariant()).OrderBy(static g => g.Key, StringComparer.Ordinal)) Row(text, kind.Key, [.. kind], outcomes);
        Row(text, "all", [.. _reports], outcomes);
        text.AppendLine();
        text.AppendLine("| fault | attempts | failures | longest wait, s |");
        text.AppendLine("|---|---|---|---|");
        foreach (IGrouping<FaultAction, AttemptReport> action in _reports.Where(static r => r.Plan.Kind != AttemptKind.Snapshot).GroupBy(static r => r.Plan.Fault.Action).OrderBy(static g => g.Key))
            text.AppendLine(CultureInfo.InvariantCulture, $"| {action.Key} | {action.Count()} | {action.Count(static r => r.Failures.Count > 0)} | {action.Max(static r => Longest(r).TotalSeconds):0.0} |");
        text.AppendLine(CultureInfo.InvariantCulture, $"{_reports.Count} attempts in {Stopwatch.GetElapsedTime(_startedAt).TotalSeconds:0} s, {Failed.Count()} failed");
        return text.ToString();
    }

    private static TimeSpan Longest(AttemptReport report) => report.SourceTime > report.DestinationTime ? report.SourceTime : report.DestinationTime;

    private static void Row(StringBuilder text, string name, AttemptReport[] reports, Outcome[] outcomes) => text.AppendLine(CultureInfo.InvariantCulture,
        $"| {name} | {reports.Length} | {reports.Count(static r => r.FaultHappened)} | {string.Join(" | ", outcomes.Select(o => reports.Count(r => r.Outcome == o)))} | {reports.Count(static r => r.Failures.Count > 0)} "
        + $"| {reports.Max(static r => r.SourceTime.TotalSeconds):0.0} | {reports.Max(static r => r.DestinationTime.TotalSeconds):0.0} | {reports.Average(static r => r.Total.TotalSeconds):0.00} |");
}
