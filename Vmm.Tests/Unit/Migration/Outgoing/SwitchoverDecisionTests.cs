using Vmm.Core.SaveVm;
using Vmm.Migration.Outgoing;

namespace Vmm.Tests.Unit.Migration.Outgoing;

/// <summary>When the VM stops: single decisions, and whole migrations of a simulated guest against QEMU's rule.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class SwitchoverDecisionTests
{
    private const long MB = 1_000_000, GB = 1000 * MB;

    /// <summary>1 GB/s and 300 ms, so 300 MB fit; 1000 MB were to be sent at the beginning.</summary>
    [TestCase(400, 400, 0, ExpectedResult = "TooLarge", Description = "QEMU goes on, too")]
    [TestCase(290, 301, 0, ExpectedResult = "TooLarge", Description = "the guest has filled the gap")]
    [TestCase(290, 295, 0, ExpectedResult = "WorthMore", Description = "710 sent, 5 dirtied")]
    [TestCase(0, 0, 0, ExpectedResult = "Stop", Description = "nothing is left")]
    [TestCase(0, 0, 200, ExpectedResult = "Stop", Description = "the rest goes only after the stop")]
    [TestCase(0, 0, 400, ExpectedResult = "TooLarge", Description = "the rest goes only after the stop, and is too large")]
    [TestCase(0, 1, 0, ExpectedResult = "Stop", Description = "a millisecond")]
    [TestCase(0, 2, 0, ExpectedResult = "WorthMore", Description = "two milliseconds")]
    [TestCase(0, 200, 0, ExpectedResult = "WorthMore", Description = "1000 sent, a fifth dirtied")]
    [TestCase(0, 201, 0, ExpectedResult = "Stop", Description = "1000 sent, more than a fifth dirtied")]
    public string TheFirstSynchronisation(long beforeMB, long afterMB, long stopCopyMB) =>
        $"{new SwitchoverDecision(1000 * MB).Next(Sample(beforeMB, afterMB, stopCopyMB: stopCopyMB), hasFloor: true)}";

    [Test]
    public void WithQEMUsRuleTheVmStopsAsSoonAsTheRestFits()
    {
        Assert.That(new SwitchoverDecision(1000 * MB).Next(Sample(290, 300), hasFloor: false), Is.EqualTo(SwitchoverChoice.Stop));
        Assert.That(new SwitchoverDecision(1000 * MB).Next(Sample(290, 301), hasFloor: false), Is.EqualTo(SwitchoverChoice.TooLarge));
    }

    [Test]
    public void TheVmStopsWhenASliceNoLongerShrinksTheRest()
    {
        var decision = new SwitchoverDecision(1000 * MB);
        Assert.That(decision.Next(Sample(250, 260), hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
        Assert.That(decision.Next(Sample(220, 227), hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
        Assert.That((decision.SentBytes, decision.DirtiedBytes), Is.EqualTo((40 * MB, 7 * MB)));
        Assert.That(decision.Next(Sample(187, 196), hasFloor: true), Is.EqualTo(SwitchoverChoice.Stop), "40 sent, 9 dirtied");
    }

    [Test]
    public void TheVmStopsWhenNothingIsSent([Values(260, 300)] long beforeMB)
    {
        var decision = new SwitchoverDecision(1000 * MB);
        Assert.That(decision.Next(Sample(250, 260), hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
        Assert.That(decision.Next(Sample(beforeMB, 300), hasFloor: true), Is.EqualTo(SwitchoverChoice.Stop), "a device that has no data, or that makes more than it gives away");
    }

    [Test]
    public void TheLastPhaseEndsAfterTwiceTheDowntimeLimit()
    {
        var decision = new SwitchoverDecision(1000 * MB);
        Assert.That(decision.Next(Sample(290, 290, elapsedMs: 1000), hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
        Assert.That(decision.Next(Sample(280, 280, elapsedMs: 1600), hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
        Assert.That(decision.Next(Sample(270, 270, elapsedMs: 1601), hasFloor: true), Is.EqualTo(SwitchoverChoice.Stop));
    }

    [Test]
    public void ATimeThatAFasterSwitchoverWouldSaveCounts()
    {
        // 10 MB/s are allowed while the VM runs; the link has 1 GB/s, of which avail-switchover-bandwidth tells.
        var slow = new SwitchoverSample(290 * MB, new PendingBytes(290 * MB), 300 * MB, 10 * MB, GB, 1000, 300);
        Assert.That(new SwitchoverDecision(1000 * MB).Next(slow, hasFloor: true), Is.EqualTo(SwitchoverChoice.Stop));
        Assert.That(new SwitchoverDecision(1000 * MB).Next(slow with { BytesPerSecond = 600 * MB }, hasFloor: true), Is.EqualTo(SwitchoverChoice.WorthMore));
    }

    [TestCase(0, ExpectedResult = 5)]
    [TestCase(1000, ExpectedResult = 20)]
    [TestCase(60_000, ExpectedResult = 50)]
    public double ASliceIsAFiftiethOfTheTimeSoFar(double elapsedMs) => SwitchoverDecision.SliceMs(elapsedMs);

    [Test]
    public void AnIdleVmIsDownForNextToNothingAndItsMigrationTakesAsLong()
    {
        var vm = new Guest { RamBytes = 2L << 30, BytesPerSecond = 1.5 * GB };
        Outcome ours = vm.Migrate(hasFloor: true), qemus = vm.Migrate(hasFloor: false);
        Assert.That(ours.DowntimeMs, Is.LessThan(1));
        Assert.That(qemus.DowntimeMs, Is.GreaterThan(200));
        Assert.That(ours.TotalMs, Is.LessThan(qemus.TotalMs * 1.02));
    }

    [Test]
    public void AGuestThatDirties100MBASecondIsDownForMilliseconds()
    {
        var vm = new Guest { RamBytes = 2L << 30, BytesPerSecond = 1.5 * GB, DirtyBytesPerSecond = 100 * MB };
        Outcome ours = vm.Migrate(hasFloor: true), qemus = vm.Migrate(hasFloor: false);
        Assert.That(ours.DowntimeMs, Is.LessThan(2));
        Assert.That(ours.TotalMs, Is.LessThan(qemus.TotalMs * 1.02), $"{ours}; {qemus}");
    }

    [Test]
    public void AGuestThatRewritesASmallSetFastCostsAtMostOneSlice()
    {
        var vm = new Guest { RamBytes = 2L << 30, BytesPerSecond = 1.5 * GB, DirtyBytesPerSecond = 4 * GB, WorkingSetBytes = 100 * MB };
        Outcome ours = vm.Migrate(hasFloor: true), qemus = vm.Migrate(hasFloor: false);
        Assert.That(ours.DowntimeMs, Is.LessThanOrEqualTo(qemus.DowntimeMs + 10));
        Assert.That(ours.TotalMs, Is.LessThan(qemus.TotalMs * 1.03), $"{ours}; {qemus}");
    }

    [Test]
    public void EveryMigrationThatEndsWithQEMUsRuleEndsAndWithNoMoreDowntime([Range(1, 400)] int seed)
    {
        var random = new Random(seed);
        double bandwidth = Math.Pow(10, 6 + random.NextDouble() * 4);
        var vm = new Guest
        {
            RamBytes = (long)Math.Pow(10, 6 + random.NextDouble() * 4), BytesPerSecond = bandwidth, DirtyBytesPerSecond = random.Next(4) == 0 ? 0 : bandwidth * random.NextDouble() * 1.5,
            WorkingSetBytes = random.Next(2) == 0 ? long.MaxValue : (long)Math.Pow(10, 4 + random.NextDouble() * 5), LimitMs = Math.Pow(10, random.NextDouble() * 3.5),
            SwitchoverBytesPerSecond = random.Next(4) == 0 ? bandwidth * Math.Pow(10, random.NextDouble()) : bandwidth, StopCopyBytes = random.Next(4) == 0 ? random.Next(1_000_000) : 0,
        };
        Outcome ours = vm.Migrate(hasFloor: true), qemus = vm.Migrate(hasFloor: false);
        if (!qemus.IsDone) return;
        Assert.That(ours.IsDone, $"{vm}");
        // What a guest dirties while the buffers drain depends on where the drain falls.
        double drainMs = Guest.DrainMs * Math.Min(2, 1 + vm.DirtyBytesPerSecond / vm.BytesPerSecond);
        Assert.That(ours.DowntimeMs, Is.LessThanOrEqualTo(qemus.DowntimeMs * 1.05 + 2 * drainMs), $"{vm}: {ours}; {qemus}");
        Assert.That(ours.TotalMs, Is.LessThanOrEqualTo(qemus.TotalMs * 1.02 + vm.LimitMs + 50 + 20 * Guest.DrainMs), $"{vm}: {ours}; {qemus}");
    }

    private static SwitchoverSample Sample(long beforeMB, long afterMB, double elapsedMs = 1000, long stopCopyMB = 0) =>
        new(beforeMB * MB, new PendingBytes(afterMB * MB, stopCopyMB * MB), 300 * MB, GB, GB, elapsedMs, 300);

    private readonly record struct Outcome(bool IsDone, double DowntimeMs, double TotalMs);

    /// <summary>A guest that dirties pages at a rate inside a working set, on a link with a bandwidth, and the loop around the decision.</summary>
    private sealed record Guest
    {
        internal const double DrainMs = 3, SyncMs = 0.5;
        private const int MostSlices = 200_000;

        public required double RamBytes { get; init; }
        public required double BytesPerSecond { get; init; }
        public double DirtyBytesPerSecond { get; init; }
        public double WorkingSetBytes { get; init; } = long.MaxValue;
        public double LimitMs { get; init; } = 300;
        public double SwitchoverBytesPerSecond { get; init; }
        public double StopCopyBytes { get; init; }

        internal Outcome Migrate(bool hasFloor)
        {
            double after = SwitchoverBytesPerSecond > 0 ? SwitchoverBytesPerSecond : BytesPerSecond;
            var decision = new SwitchoverDecision((long)RamBytes);
            double now = 0, syncedAt = 0, bulk = RamBytes, hot = 0;
            for (int slice = 0; slice < MostSlices; slice++)
            {
                double sent = Math.Min(bulk + hot, BytesPerSecond / 1000 * (decision.Last == SwitchoverChoice.WorthMore ? SwitchoverDecision.SliceMs(now) : 50));
                // What has never been sent goes before what is dirty again.
                double fromBulk = Math.Min(bulk, sent);
                (bulk, hot) = (bulk - fromBulk, hot - (sent - fromBulk));
                now += Math.Max(sent / BytesPerSecond * 1000, 0.1);
                double threshold = now < 100 ? 0 : after * LimitMs / 1000;
                bool isPassOver = bulk + hot < 1;
                if (bulk + hot + StopCopyBytes > threshold && !isPassOver) continue;
                if (isPassOver || !hasFloor) now += DrainMs;
                SwitchoverChoice choice = Sync();
                if (choice == SwitchoverChoice.Stop && hasFloor && !isPassOver)
                {
                    now += DrainMs;
                    if (Sync() == SwitchoverChoice.TooLarge) choice = SwitchoverChoice.TooLarge;
                }
                if (choice == SwitchoverChoice.Stop) return new Outcome(true, (bulk + hot + StopCopyBytes) / after * 1000, now + (bulk + hot + StopCopyBytes) / after * 1000);
                if (bulk + hot < 1) now += 5;

                SwitchoverChoice Sync()
                {
                    long before = (long)(bulk + hot);
                    hot = Math.Min(Math.Min(WorkingSetBytes, RamBytes - bulk), hot + DirtyBytesPerSecond / 1000 * (now - syncedAt));
                    syncedAt = now;
                    now += SyncMs;
                    return decision.Next(new SwitchoverSample(before, new PendingBytes((long)(bulk + hot), (long)StopCopyBytes), (long)threshold, BytesPerSecond, after, now, LimitMs), hasFloor);
                }
            }
            return default;
        }
    }
}
