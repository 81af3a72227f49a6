using System.Globalization;

namespace Vmm.Tests.Faults;

/// <summary>One VM that goes from process to process by migrations and updates with random options and faults. Its memory stays what it was.</summary>
[TestFixture, NonParallelizable]
[Category("faults")]
internal sealed class HopTests
{
    /// <summary>Hops whose median is compared: one process's memory depends on when its collector ran last.</summary>
    private const int Sample = 25;

    private const double Growth = 0.05;

    /// <summary>All destinations wait for migrate-incoming, so that any of them can take any of the attempts.</summary>
    private const int DeferredWay = 2;

    /// <summary>The part of the run that every run of the tests has.</summary>
    [Test, CancelAfter(600_000)]
    public Task TwentyHops() => Hop(20, Number("VMM_FAULT_SEED", 1), checkMemory: false);

    [Test, Category("slow"), Explicit("takes most of half an hour"), CancelAfter(14_400_000)]
    public Task AThousandHops() => Hop(Number("VMM_FAULT_COUNT", 1000), Number("VMM_FAULT_SEED", 500_000), checkMemory: true);

    private static async Task Hop(int hops, int seed, bool checkMemory)
    {
        var run = new FaultRun(TestContext.Progress, 100);
        var memory = new List<long>();
        var pids = new HashSet<int>();
        int attempts = 0, updates = 0;
        await using (var lane = new Lane(AttemptKind.Plain, run.Take))
        {
            for (int i = 0; pids.Count <= hops; i++)
            {
                Assert.That(i, Is.LessThan(hops * 10), "most attempts move the VM");
                AttemptKind kind = (i % 3) switch { 0 => AttemptKind.Plain, 1 => AttemptKind.Multifd, _ => AttemptKind.Update };
                AttemptPlan plan = AttemptPlan.Of(kind, ((seed + i) * AttemptPlan.Ways) + DeferredWay);
                // The VM is one and the same all the way, so no fault may take its only process.
                if (plan.Fault.IsKill) plan = plan with { Fault = plan.Fault with { Action = plan.Fault.Action == FaultAction.KillSource ? FaultAction.FreezeSource : FaultAction.FreezeDestination, Ms = 200 } };
                await lane.Run(plan);
                attempts++;
                if (lane.Vm is not { } vm) continue;
                if (pids.Add(vm.Pid) && kind == AttemptKind.Update) updates++;
                memory.Add(vm.ResidentBytes());
            }
        }
        int sample = Math.Min(Sample, memory.Count / 2);
        double first = Median(memory.Take(sample)), last = Median(memory.TakeLast(sample));
        TestContext.Out.WriteLine(run.Totals());
        TestContext.Out.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"{pids.Count - 1} hops of one VM in {attempts} attempts, {updates} of the hops by update; resident memory {first / (1 << 20):0.0} MiB at first, {last / (1 << 20):0.0} MiB at last ({(last / first) - 1:+0.0%;-0.0%})"));
        Assert.That(string.Join('\n', run.Failed), Is.Empty);
        if (checkMemory) Assert.That(last, Is.LessThan(first * (1 + Growth)), "resident memory of the VM's process");
    }

    private static double Median(IEnumerable<long> values) => values.Order().ToArray() is { Length: > 0 } sorted ? sorted[sorted.Length / 2] : 0;

    private static int Number(string variable, int otherwise) =>
        Environment.GetEnvironmentVariable(variable) is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : otherwise;
}
