using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.Workloads;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Devices;

/// <summary>The workload as a device: it follows the run state, keeps its rate, continues after a migration and reports what the migration lost.</summary>
[TestFixture]
public sealed class PatternWorkloadTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [Test]
    public void ItWritesWhileTheVmRunsAndIsQuietWhenAStopReturns()
    {
        using TestVm vm = Create("pattern,rate=0", 4 << 20);
        IWorkload workload = Workload(vm);
        Assert.That((workload.Writes, workload.Verify()), Is.EqualTo((0L, new WorkloadReport(0, 0, null))), "nothing before the start");
        for (int round = 0; round < 20; round++)
        {
            vm.Vm.Cont();
            WaitForWrites(workload, workload.Writes + 500);
            long start = Stopwatch.GetTimestamp();
            vm.Vm.Stop();
            TimeSpan took = Stopwatch.GetElapsedTime(start);
            long writes = workload.Writes;
            byte[] after = vm.Ram.ReadOnlySlice(0, 4 << 20).ToArray();
            // If Stop had not waited for the writer, a write could come between the first look and these.
            Assert.That(workload.Verify(), Is.EqualTo(new WorkloadReport(1024, 0, null)));
            Assert.That(workload.Writes, Is.EqualTo(writes));
            Assert.That(vm.Ram.ReadOnlySlice(0, 4 << 20).SequenceEqual(after));
            Assert.That(took, Is.LessThan(TimeSpan.FromSeconds(1)));
        }
        Assert.That(workload.Violations, Is.Zero);
    }

    [Test]
    public void RamThatWasLostWholeIsSeenWhereAWorkloadIsExpected([Values] bool expect)
    {
        using TestVm vm = Create($"pattern,rate=0,expect={(expect ? "on" : "off")}", 4 << 20);
        IWorkload workload = Workload(vm);
        Assert.That(workload.Verify().BadPages, Is.EqualTo(expect ? 1 : 0), "Verify reports the loss even before the VM starts");
        vm.Vm.Cont();
        if (!expect) WaitForWrites(workload, 10);
        else Assert.That(() => workload.Violations, Is.GreaterThan(0).After(30_000, 5));
        vm.Vm.Stop();
        WorkloadReport report = workload.Verify();
        Assert.That(report.BadPages, Is.EqualTo(expect ? 1 : 0));
        if (!expect) return;
        Assert.That(report.FirstBad!.ToString(), Does.Contain("expected the workload's root").And.Contain("the whole block was lost"));
        Assert.That(workload.Writes, Is.Zero, "nothing hides the loss");
    }

    [Test]
    public async Task AWorkloadThatIsExpectedGoesOn()
    {
        using TestVm source = Create("pattern,rate=0", 4 << 20);
        using TestVm destination = Create("pattern,rate=0,expect=on", 4 << 20, incoming: true);
        source.Vm.Cont();
        WaitForWrites(Workload(source), 100);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        int port = destination.Engine.Query().SocketAddresses[0].Port;
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{port}")).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        WaitForWrites(Workload(destination), Workload(source).Writes + 10);
        Assert.That(Workload(destination).Verify().BadPages, Is.Zero);
        Assert.That(Workload(destination).Violations, Is.Zero);
    }

    [Test]
    public void TheSameSeedGivesTheSameRam()
    {
        using TestVm a = Create("pattern,rate=0,seed=5", 1 << 20), b = Create("pattern,rate=0,seed=5", 1 << 20), c = Create("pattern,rate=0,seed=6", 1 << 20);
        foreach (TestVm vm in (TestVm[])[a, b, c])
        {
            var block = new PatternBlock(vm.Ram);
            block.Format(vm == c ? 6UL : 5UL, prefill: false);
            for (int i = 0; i < 100; i++) block.Rewrite(i);
        }
        RamAssert.AreEqual(a.Vm.Memory, b.Vm.Memory);
        Assert.That(c.Ram.ReadOnlySlice(0, 4096).SequenceEqual(a.Ram.ReadOnlySlice(0, 4096)), Is.False);
    }

    [Test]
    public void TheRateIsKept()
    {
        using TestVm vm = Create("pattern,rate=40M", 4 << 20); // 10240 pages a second
        IWorkload workload = Workload(vm);
        vm.Vm.Cont();
        WaitForWrites(workload, 1);
        long before = workload.Writes, start = Stopwatch.GetTimestamp();
        WaitForWrites(workload, before + 8000);
        double rate = (workload.Writes - before) / Stopwatch.GetElapsedTime(start).TotalSeconds;
        // The upper limit also holds after the writer was held up. There is no lower limit, because a busy machine slows the writer down.
        Assert.That(rate, Is.LessThan(10240 * 1.6));
    }

    [Test]
    public void OnlyTheWorkingSetIsWritten()
    {
        using TestVm vm = Create("pattern,rate=0,working-set=10", 4 << 20);
        vm.Vm.Cont();
        WaitForWrites(Workload(vm), 3000);
        vm.Vm.Stop();
        int data = (int)PatternBlock.DataPagesOf(vm.Ram);
        Assert.That(Enumerable.Range(0, data / 10).Count(p => !vm.Ram.IsZeroPage(p)), Is.GreaterThan(data / 11));
        Assert.That(Enumerable.Range((data / 10) + 1, data - (data / 10) - 1).All(p => vm.Ram.IsZeroPage(p)));
    }

    [Test]
    public void PrefillWritesEveryPageOnceFirst()
    {
        using TestVm vm = Create("pattern,rate=4K,prefill=on", 4 << 20);
        IWorkload workload = Workload(vm);
        vm.Vm.Cont();
        WaitForWrites(workload, 1022);
        Assert.That(workload.Verify(), Is.EqualTo(new WorkloadReport(1024, 0, null)));
        Assert.That(Enumerable.Range(0, 1024).Count(p => vm.Ram.IsZeroPage(p)), Is.Zero);
    }

    [TestCase("off", "off")]
    [TestCase("on", "on")]
    public async Task ItGoesOnAfterALiveMigration(string sourceState, string destinationState)
    {
        using TestVm source = Create($"pattern,rate=0,working-set=20,state={sourceState},seed=3", 8 << 20);
        using TestVm destination = Create($"pattern,rate=0,working-set=20,state={destinationState}", 8 << 20, incoming: true);
        source.Vm.Cont();
        WaitForWrites(Workload(source), 2000);
        await Migrate(source, destination);
        long moved = Workload(source).Writes;
        WaitForWrites(Workload(destination), moved + 2000);
        Assert.That(Workload(destination).Verify(), Is.EqualTo(new WorkloadReport(2048, 0, null)));
        Assert.That(Workload(destination).Violations, Is.Zero);
        Assert.That(Workload(source).Verify(), Is.EqualTo(new WorkloadReport(2048, 0, null)), "the source is quiet and whole");
    }

    [Test]
    public async Task ItsCountArrivesBeforeItsThreadHasHadATurn()
    {
        using TestVm source = Create("pattern,rate=0", 1 << 20);
        using TestVm destination = Create("pattern,rate=0,expect=on", 1 << 20, incoming: true, autoStart: false);
        source.Vm.Cont();
        WaitForWrites(Workload(source), 100);
        await Migrate(source, destination);
        Assert.That(Workload(destination).Verify().BadPages, Is.Zero);
        Assert.That(Workload(destination).Writes, Is.EqualTo(Workload(source).Writes));
    }

    [Test]
    public async Task AMigrationThatLosesOnePageIsFoundByTheDestinationsWorkload()
    {
        using TestVm source = Create("pattern,rate=0,working-set=1", 4 << 20);
        using TestVm destination = Create("pattern,rate=0,working-set=1", 4 << 20, incoming: true, autoStart: false);
        source.Vm.Cont();
        WaitForWrites(Workload(source), 1000);
        source.Vm.Stop();
        byte[] old = source.Ram.ReadOnlySlice(4 * 4096, 4096).ToArray();
        source.Vm.Cont();
        WaitForWrites(Workload(source), Workload(source).Writes + 1000);
        await Migrate(source, destination);
        old.CopyTo(destination.Ram.Slice(4 * 4096, 4096)); // The migration lost the update of this page.
        destination.Vm.Cont();
        Assert.That(SpinWait.SpinUntil(() => Workload(destination).Violations > 0, s_deadline));
        Assert.That(Workload(destination).FirstViolation!.ToString(), Does.StartWith("RAM block 'm' page 4: expected generation"));
        Assert.That(Workload(destination).Verify(), Is.EqualTo(new WorkloadReport(1024, 1, Workload(destination).FirstViolation)));
    }

    [Test]
    public async Task ConsistentLossIsFoundThroughTheSection([Values] bool state)
    {
        string device = $"pattern,rate=0,state={(state ? "on" : "off")}";
        using TestVm source = Create(device, 1 << 20);
        using TestVm destination = Create(device, 1 << 20, incoming: true, autoStart: false);
        source.Vm.Cont();
        WaitForWrites(Workload(source), 200);
        source.Vm.Stop();
        byte[] old = source.Ram.ReadOnlySlice(0, 1 << 20).ToArray();
        source.Vm.Cont();
        WaitForWrites(Workload(source), Workload(source).Writes + 200);
        await Migrate(source, destination);
        old.CopyTo(destination.Ram.Slice(0, 1 << 20)); // The migration lost every page written since, the root included.
        WorkloadReport report = Workload(destination).Verify();
        Assert.That(report.BadPages, Is.EqualTo(state ? 1 : 0));
        if (state) Assert.That(report.FirstBad!.Expected, Does.StartWith("what section 'pattern' says"));
    }

    [Test]
    public void ALostRootIsReportedAndNothingIsWrittenOverTheProof()
    {
        using TestVm vm = Create("pattern,rate=0", 1 << 20);
        vm.Vm.Cont();
        WaitForWrites(Workload(vm), 100);
        vm.Vm.Stop();
        vm.Ram.Slice((1 << 20) - 4096, 4096).Clear();
        byte[] before = vm.Ram.ReadOnlySlice(0, 1 << 20).ToArray();
        vm.Vm.Cont();
        Assert.That(SpinWait.SpinUntil(() => Workload(vm).Violations > 0, s_deadline));
        Assert.That(Workload(vm).Verify().FirstBad!.ToString(), Is.EqualTo("RAM block 'm' page 255: expected the workload's root, found none, though its index is there"));
        Assert.That(vm.Ram.ReadOnlySlice(0, 1 << 20).SequenceEqual(before));
    }

    [Test]
    public void ItWorksOnAllBlocksOrOnTheOneThatIsNamed()
    {
        RamBlockOptions[] blocks = [new() { Name = "a", SizeBytes = 1 << 20 }, new() { Name = "tiny", SizeBytes = 4096 }, new() { Name = "b", SizeBytes = 2 << 20 }];
        foreach ((string device, long pages) in ((string, long)[])[("pattern,rate=0", 768), ("pattern,rate=0,block=b", 512)])
        {
            using var vm = new TestVm(new VmOptions { Memory = blocks, Devices = [DeviceOptions.Parse(device)] }, static b => b.AddPlugin<WorkloadPlugin>());
            vm.Vm.Cont();
            WaitForWrites(Workload(vm), 2000);
            Assert.That(Workload(vm).Verify(), Is.EqualTo(new WorkloadReport(pages, 0, null)), device);
        }
    }

    [TestCase("pattern,block=x", "no RAM block 'x'; known: m")]
    [TestCase("pattern,working-set=0", "working-set")]
    [TestCase("pattern,working-set=101", "working-set")]
    [TestCase("pattern,rate=fast", "rate")]
    [TestCase("pattern,state=maybe", "state")]
    [TestCase("pattern,speed=1", "speed")]
    public void ABadOptionIsNamedAndLeavesNothingBehind(string device, string named)
    {
        var services = new TestServices();
        services.Memory.AddBlock(new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 });
        using (services) Assert.That(() =>
        {
            var options = DeviceOptions.Parse(device);
            using var workload = new PatternWorkload(options, services);
            options.ThrowIfUnused();
        }, Throws.TypeOf<ConfigurationException>().With.Message.Contains(named));
        Assert.That(services.SaveVm.Entries(), Is.Empty);
    }

    [Test]
    public void ABlockThatIsTooSmallIsRefused() =>
        Assert.That(() => Create("pattern", 8192), Throws.TypeOf<ConfigurationException>().With.Message.Contains("3 pages"));

    private static TestVm Create(string device, ulong ramBytes, bool incoming = false, bool autoStart = true) => new(new VmOptions
    {
        Memory = [new RamBlockOptions { Name = "m", SizeBytes = ramBytes }], Devices = [DeviceOptions.Parse(device)], IsIncoming = incoming, AutoStart = autoStart,
    }, static b => b.AddPlugin<WorkloadPlugin>());

    private static IWorkload Workload(TestVm vm) => vm.Vm.Devices.OfType<IWorkload>().Single();

    private static void WaitForWrites(IWorkload workload, long writes) =>
        Assert.That(SpinWait.SpinUntil(() => workload.Writes >= writes, s_deadline), $"{workload.Writes} writes while waiting for {writes} writes");

    private static async Task Migrate(TestVm source, TestVm destination)
    {
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b);
        Assert.That(await source.Engine.Migrate(a).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
    }
}
