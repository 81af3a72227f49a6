using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Outgoing;

/// <summary>What is left when a VM stops, between two VMs of this process.</summary>
[TestFixture]
public sealed class DowntimeFloorTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    /// <summary>100 MB/s and 300 ms, so 30 MB fit into the downtime limit.</summary>
    [Test]
    public async Task AnIdleVmHasNextToNothingLeftWhenItStops([Values] bool hasFloor, [Values] bool returnPath)
    {
        using TestVm source = TestVm.WithRam(48 << 20).FilledRandom(1);
        using TestVm destination = TestVm.WithRam(48 << 20, incoming: true);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath)]);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 100 << 20, HasDowntimeFloor = hasFloor };
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b), outgoing = source.Engine.Migrate(a);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        RamStats ram = source.Engine.Query().Ram!;
        Assert.That(ram.DowntimeBytes, hasFloor ? Is.LessThan(64 << 10) : Is.GreaterThan(4 << 20));
    }

    [Test]
    public async Task AVmThatDoesNotRunIsNotWaitedFor()
    {
        using TestVm source = TestVm.WithRam(48 << 20).FilledRandom(2);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 100 << 20 };
        Assert.That(await source.Engine.Migrate(new MemoryChannel()).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(source.Engine.Query().Ram!.DowntimeBytes, Is.GreaterThan(4 << 20));
    }
}
