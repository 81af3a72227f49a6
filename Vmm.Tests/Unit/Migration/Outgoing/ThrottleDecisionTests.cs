using Vmm.Core.SaveVm;
using Vmm.Migration.Outgoing;

namespace Vmm.Tests.Unit.Migration.Outgoing;

/// <summary>How far auto-converge throttles the guest: QEMU's rule.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class ThrottleDecisionTests
{
    private const long MB = 1_000_000;

    [Test]
    public void TwoPeriodsWithTooManyDirtyPagesMakeOneStep()
    {
        var decision = new ThrottleDecision();
        Assert.That(Periods(decision, new(), (60, 100), (60, 100), (60, 100), (60, 100), (60, 100), (60, 100)), Is.EqualTo((int[])[0, 20, 20, 30, 30, 40]));
    }

    [Test]
    public void TheThresholdIsAPartOfWhatWasSent()
    {
        Assert.That(Periods(new ThrottleDecision(), new(), (50, 100), (50, 100), (51, 100), (50, 100), (51, 100)), Is.EqualTo((int[])[0, 0, 0, 0, 20]), "as in QEMU, the two need not follow each other");
        Assert.That(Periods(new ThrottleDecision(), new() { ThrottleTriggerThresholdPercent = 100 }, (100, 100), (100, 100), (101, 100), (101, 100)), Is.EqualTo((int[])[0, 0, 0, 20]));
    }

    [Test]
    public void TheShareStopsAtTheLargest()
    {
        var parameters = new MigrationParameters { CpuThrottleInitialPercent = 70, CpuThrottleIncrementPercent = 25, MaxCpuThrottlePercent = 90 };
        Assert.That(Periods(new ThrottleDecision(), parameters, (100, 100), (100, 100), (100, 100), (100, 100), (100, 100), (100, 100)), Is.EqualTo((int[])[0, 70, 70, 90, 90, 90]));
    }

    /// <summary>At 20 % the guest runs 80 %; with 50 of 55 MB allowed it may run 72.7 %, which QEMU rounds down to 72, so the step is 8 instead of 10.</summary>
    [TestCase(55, 28)]
    [TestCase(500, 30)]
    public void WithTailslowAStepIsNoLargerThanNeeded(long dirtiedMB, int expected)
    {
        var parameters = new MigrationParameters { HasCpuThrottleTailslow = true };
        Assert.That(Periods(new ThrottleDecision(), parameters, (55, 100), (55, 100), (dirtiedMB, 100), (dirtiedMB, 100))[^1], Is.EqualTo(expected));
    }

    [Test]
    public void SynchronisationsWithinASecondCountTogether()
    {
        var decision = new ThrottleDecision();
        var parameters = new MigrationParameters();
        for (int i = 1; i <= 20; i++) Assert.That(decision.Next(i * 50, 3 * MB, i * 5 * MB, parameters), Is.Zero);
        Assert.That(decision.Next(1001, 0, 100 * MB, parameters), Is.Zero, "the first period with 60 of 100 MB");
        Assert.That(decision.Next(2001, 60 * MB, 200 * MB, parameters), Is.Zero, "exactly a second is too short");
        Assert.That(decision.Next(2002, 0, 200 * MB, parameters), Is.EqualTo(20));
    }

    [Test]
    public void APassOfManySecondsIsOnePeriod()
    {
        var decision = new ThrottleDecision();
        Assert.That(decision.Next(30_000, 900 * MB, 1000 * MB, new()), Is.Zero);
        Assert.That(decision.Next(60_000, 900 * MB, 1900 * MB, new()), Is.EqualTo(20));
    }

    private static int[] Periods(ThrottleDecision decision, MigrationParameters parameters, params (long DirtiedMB, long SentMB)[] periods)
    {
        long sent = 0;
        return [.. periods.Select((p, i) => decision.Next((i + 1) * 1001, p.DirtiedMB * MB, sent += p.SentMB * MB, parameters))];
    }
}
