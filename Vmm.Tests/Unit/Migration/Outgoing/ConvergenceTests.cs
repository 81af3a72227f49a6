using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Workloads;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Outgoing;

/// <summary>A guest that dirties faster than its link sends: what auto-converge, the downtime ramp and the deadline make of it.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class ConvergenceTests
{
    private const ulong RamBytes = 24 << 20;

    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [Test]
    public async Task WithAutoConvergeAGuestThatIsTooFastMoves()
    {
        using TestVm source = Busy(), destination = Busy(incoming: true);
        source.Engine.SetCapabilities([new(MigrationCapability.AutoConverge, true)]);
        source.Engine.Parameters = source.Engine.Parameters with { CpuThrottleInitialPercent = 95 };
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Start(source, destination);
        int? seen = null;
        LeakCheck.WaitFor(() => (seen ??= source.Engine.Query().CpuThrottlePercent) is not null || outgoing.IsCompleted, "the guest was not throttled");
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That(seen, Is.EqualTo(95));
        Assert.That((source.Vm.CpuThrottle.Percent, source.Engine.Query().CpuThrottlePercent), Is.EqualTo((0, (int?)null)), "the throttle ends with the migration");
        destination.Vm.Stop();
        Assert.That(destination.Vm.Devices.OfType<IWorkload>().Single().Verify().BadPages, Is.Zero);
    }

    [Test]
    public async Task WithoutItTheGuestStaysAndQueryMigrateSaysWhy()
    {
        using TestVm source = Busy(), destination = Busy(incoming: true);
        var passes = new CountdownEvent(4);
        source.Engine.PassCompleted += _ => { if (!passes.IsSet) passes.Signal(); };
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Start(source, destination);
        Assert.That(passes.Wait(s_deadline), "no four passes");
        LeakCheck.WaitFor(() => source.Engine.Query().SwitchoverWait == "stalled", "query-migrate does not say that the migration stalls");
        MigrationInfo info = source.Engine.Query();
        Assert.That((info.Status, info.CpuThrottlePercent), Is.EqualTo((MigrationStatus.Active, (int?)null)));
        Assert.That(info.PredictedDowntimeMs, Is.GreaterThan(info.ExpectedDowntimeMs > 0 ? 10 : 0));
        source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        await incoming.WaitAsync(s_deadline);
    }

    [Test]
    public async Task ACancelEndsTheThrottle()
    {
        using TestVm source = Busy(), destination = Busy(incoming: true);
        source.Engine.SetCapabilities([new(MigrationCapability.AutoConverge, true)]);
        // 20 % are not enough, so the migration goes on.
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Start(source, destination);
        LeakCheck.WaitFor(() => source.Vm.CpuThrottle.Percent > 0, "the guest was not throttled");
        source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        await incoming.WaitAsync(s_deadline);
        Assert.That((source.Vm.CpuThrottle.Percent, source.Vm.RunState.State), Is.EqualTo((0, RunState.Running)));
    }

    [Test]
    public async Task TheDowntimeLimitGrowsUntilTheGuestMoves()
    {
        using TestVm source = Busy(), destination = Busy(incoming: true);
        source.Engine.Parameters = source.Engine.Parameters with { MaxDowntimeLimitMs = 2000 };
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Start(source, destination);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That(source.Engine.Parameters.DowntimeLimitMs, Is.EqualTo(10), "the parameter itself does not change");
    }

    [Test]
    public async Task TheDeadlineCancelsOrForces([Values("cancel", "force")] string action)
    {
        using TestVm source = Busy(), destination = Busy(incoming: true);
        source.Engine.Parameters = source.Engine.Parameters with { PrecopyDeadlineMs = 500, PrecopyDeadlineAction = action };
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Start(source, destination);
        MigrationStatus expected = action == "force" ? MigrationStatus.Completed : MigrationStatus.Cancelled;
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(expected), () => $"{source.Engine.Query().Error}");
        Assert.That(source.Engine.Query().TotalTimeMs, Is.GreaterThanOrEqualTo(500));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(expected == MigrationStatus.Completed ? MigrationStatus.Completed : MigrationStatus.Failed));
        Assert.That((source.Vm.RunState.IsRunning, destination.Vm.RunState.IsRunning), Is.EqualTo((expected != MigrationStatus.Completed, expected == MigrationStatus.Completed)));
    }

    /// <summary>A guest that dirties 120 MB/s at random; the link below takes 40.</summary>
    private static TestVm Busy(bool incoming = false) => new(new VmOptions
    {
        Memory = [new RamBlockOptions { Name = "m", SizeBytes = RamBytes }], Devices = [DeviceOptions.Parse("pattern,rate=120M")], IsIncoming = incoming,
    }, static b => b.AddPlugin<WorkloadPlugin>());

    private static (Task<MigrationStatus> Outgoing, Task<MigrationStatus> Incoming) Start(TestVm source, TestVm destination)
    {
        source.Vm.Cont();
        IWorkload workload = source.Vm.Devices.OfType<IWorkload>().Single();
        // All of the RAM has content, so that a pass takes long enough to fill it again.
        LeakCheck.WaitFor(() => workload.Writes > 3 * (long)(RamBytes / 4096), "the guest does not write");
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 40 << 20, DowntimeLimitMs = 10 };
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b);
        return (source.Engine.Migrate(a), incoming);
    }
}
