using Vmm.Core.SaveVm;
using Vmm.Migration.Outgoing;

namespace Vmm.Tests.Unit.Migration.Outgoing;

/// <summary>When a migration stalls, and how its downtime limit grows then.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class DowntimeRampTests
{
    private static readonly MigrationParameters s_parameters = new() { DowntimeLimitMs = 100, MaxDowntimeLimitMs = 500 };

    /// <summary>What is left after each pass, and the limit behind it.</summary>
    [TestCase("1000 900 800 700", "100 100 100 100", Description = "progress")]
    [TestCase("1000 1000 1000 1000 1000", "100 200 400 500 500", Description = "none")]
    [TestCase("1000 950 902 856", "100 100 100 100", Description = "5 % are progress")]
    [TestCase("1000 951 951 951", "100 200 400 500", Description = "less is not")]
    [TestCase("1000 2000 1500 900", "100 200 400 400", Description = "a pass must leave less than the best one before it")]
    public void ThePassesWithoutProgressDoubleTheLimit(string left, string limits)
    {
        var ramp = new DowntimeRamp();
        Assert.That(string.Join(' ', left.Split(' ').Select((l, i) =>
        {
            ramp.OnPass((i + 1) * 1000, long.Parse(l));
            return ramp.Apply(s_parameters).DowntimeLimitMs;
        })), Is.EqualTo(limits));
    }

    [Test]
    public void WithoutAMaximumTheLimitStays([Values(0, 50, 100)] int max)
    {
        var ramp = new DowntimeRamp();
        for (int i = 1; i <= 100; i++) ramp.OnPass(i * 1000, 1000);
        Assert.That(ramp.IsStalled);
        MigrationParameters parameters = s_parameters with { MaxDowntimeLimitMs = (ulong)max };
        Assert.That(ramp.Apply(parameters), Is.SameAs(parameters));
        Assert.That(ramp.Apply(new MigrationParameters { DowntimeLimitMs = 0, MaxDowntimeLimitMs = 7 }).DowntimeLimitMs, Is.EqualTo(7));
    }

    [Test]
    public void ShortPassesCountTogether()
    {
        var ramp = new DowntimeRamp();
        for (int ms = 100; ms < 300; ms += 5) ramp.OnPass(ms, 1000);
        Assert.That((ramp.IsStalled, ramp.Apply(s_parameters).DowntimeLimitMs), Is.EqualTo((true, 200UL)), "the passes at 100 and 200 ms");
        ramp.OnPass(400, 10);
        Assert.That(ramp.IsStalled, Is.False);
    }
}
