using System.Globalization;

namespace Vmm.Tests.Faults;

/// <summary>
/// Migrations, updates and snapshots between real processes, each under one fault that its seed decides. Afterwards exactly one side runs or can be started, the
/// guest's pages are whole, every wait has ended in its time, and nothing is left. A failure prints its seed; <see cref="OneSeed"/> runs it alone.
/// </summary>
[TestFixture, NonParallelizable]
[Category("faults")]
internal sealed class FaultRunTests
{
    /// <summary>The part of the run that every run of the tests has.</summary>
    [Test, CancelAfter(600_000)]
    public Task AHundredAttempts() =>
        Run([(AttemptKind.Plain, 32), (AttemptKind.Multifd, 32), (AttemptKind.Device, 12), (AttemptKind.Update, 16), (AttemptKind.Snapshot, 8)], Number("VMM_FAULT_SEED", 1), Number("VMM_FAULT_LANES", 4), ways: 3);

    /// <summary>
    /// The whole run. <c>VMM_FAULT_SEED</c> gives the first seed, <c>VMM_FAULT_COUNT</c> the number of attempts (3,000 without snapshots) and
    /// <c>VMM_FAULT_LANES</c> how many run at a time.
    /// </summary>
    [Test, Category("slow"), Explicit("takes most of an hour"), CancelAfter(14_400_000)]
    public Task ThreeThousandAttempts()
    {
        int count = Number("VMM_FAULT_COUNT", 3000);
        return Run([(AttemptKind.Plain, count / 3), (AttemptKind.Multifd, count / 3), (AttemptKind.Device, count / 6), (AttemptKind.Update, count / 6), (AttemptKind.Snapshot, count / 10)],
            Number("VMM_FAULT_SEED", 100_000), Number("VMM_FAULT_LANES", 8));
    }

    /// <summary>One attempt alone, between two new processes: <c>VMM_FAULT_KIND</c> and <c>VMM_FAULT_SEED</c>, as a failure prints them.</summary>
    [Test, Category("slow"), Explicit("needs a seed"), CancelAfter(600_000)]
    public Task OneSeed() => Run(Kind(), Number("VMM_FAULT_SEED", 1));

    /// <summary>Attempts that failed in a run, each with what was wrong then.</summary>
    [TestCase(AttemptKind.Multifd, 56, TestName = "{m}(a destination waits for ever for one channel that stalls)")]
    [TestCase(AttemptKind.Update, 9, TestName = "{m}(a VM that is started by force keeps the new process's socket)")]
    [TestCase(AttemptKind.Update, 15, TestName = "{m}(an old process waits for a start that cannot come)")]
    [TestCase(AttemptKind.Update, 100_000, TestName = "{m}(the files of an old process that was killed stay)")]
    [TestCase(AttemptKind.Update, 100_004, TestName = "{m}(a new process is killed after it has confirmed)")]
    [CancelAfter(120_000)]
    public Task WhatFailedOnceHolds(AttemptKind kind, int seed) => Run(kind, seed);

    [Test]
    public void ASeedAlwaysGivesTheSamePlan()
    {
        foreach (AttemptKind kind in Enum.GetValues<AttemptKind>())
        {
            string[] plans = [.. Enumerable.Range(0, 500).Select(s => AttemptPlan.Of(kind, s).ToString())];
            Assert.That(plans, Is.EqualTo(Enumerable.Range(0, 500).Select(s => AttemptPlan.Of(kind, s).ToString())));
            Assert.That(plans.Distinct().Count(), Is.EqualTo(500));
        }
        var actions = Enumerable.Range(0, 3000).Select(static s => AttemptPlan.Of(AttemptKind.Device, s).Fault.Action).ToHashSet();
        Assert.That(Enum.GetValues<FaultAction>().Except(actions), Is.Empty, "actions that no seed chooses");
    }

    /// <summary>Many attempts of one kind: <c>VMM_FAULT_KIND</c>, and the variables of <see cref="ThreeThousandAttempts"/>.</summary>
    [Test, Category("slow"), CancelAfter(14_400_000)]
    public Task OneKind() => Run([(Kind(), Number("VMM_FAULT_COUNT", 100))], Number("VMM_FAULT_SEED", 1), Number("VMM_FAULT_LANES", 4));

    private static AttemptKind Kind() => Enum.Parse<AttemptKind>(Environment.GetEnvironmentVariable("VMM_FAULT_KIND") ?? nameof(AttemptKind.Plain), ignoreCase: true);

    private static async Task Run(AttemptKind kind, int seed)
    {
        var run = new FaultRun(TestContext.Progress, 1);
        await using (var lane = new Lane(kind, run.Take)) await lane.Run(AttemptPlan.Of(kind, seed));
        TestContext.Out.WriteLine(run.Reports.Single());
        Assert.That(string.Join('\n', run.Failed), Is.Empty);
    }

    private static async Task Run(IReadOnlyList<(AttemptKind Kind, int Count)> counts, int seed, int lanes, int ways = AttemptPlan.Ways)
    {
        var run = new FaultRun(TestContext.Progress, 100);
        await run.Run(counts, seed, lanes, ways);
        TestContext.Out.WriteLine(run.Totals());
        Assert.That(run.Reports, Has.Count.EqualTo(counts.Sum(static c => c.Count)));
        Assert.That(string.Join('\n', run.Failed), Is.Empty);
    }

    private static int Number(string variable, int otherwise) =>
        Environment.GetEnvironmentVariable(variable) is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : otherwise;
}
