using Vmm.Core.Channels;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Faults;

/// <summary>Whole migrations inside this process over channels that read and write in short pieces and fail at a position that a seed decides.</summary>
[TestFixture]
[Category("faults")]
internal sealed class FaultChannelTests
{
    private const ulong Size = 256 << 10;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [Test]
    public Task ChannelsThatFailAnywhereLeaveOneSideRunning() => Run(1, 150);

    [Test, Category("slow"), Explicit("takes minutes"), CancelAfter(3_600_000)]
    public Task ManyChannelsThatFailAnywhereLeaveOneSideRunning() => Run(1000, 5000);

    /// <summary>A save to a file that fails leaves the VM running and is refused by a load, wherever it was cut.</summary>
    [Test]
    public async Task AFileThatFailsAnywhereIsNeverLoaded()
    {
        long length = await Measure();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(1);
        source.Vm.Cont();
        for (int seed = 0; seed < 100; seed++)
        {
            var random = new Random(seed);
            var file = new MemoryChannel();
            var channel = new FaultChannel(file, ChannelFault.Of(random, length) with { ReadFailsAt = long.MaxValue });
            MigrationStatus saved = await source.Engine.Migrate(channel).WaitAsync(s_deadline);
            Assert.That((saved, source.Vm.RunState.State), Is.EqualTo(channel.HasFailed ? (MigrationStatus.Failed, RunState.Running) : (MigrationStatus.Completed, RunState.PostMigrate)), $"seed {seed}");
            if (!channel.HasFailed) source.Vm.Cont();
            using TestVm destination = TestVm.WithRam(Size, incoming: true);
            var load = new FaultChannel(new MemoryChannel(file.Written), ChannelFault.Of(random, length) with { WriteFailsAt = long.MaxValue });
            MigrationStatus loaded = await destination.Engine.MigrateIncoming(load).WaitAsync(s_deadline);
            bool whole = !channel.HasFailed && !load.HasFailed;
            // The last section, VMDESC, describes the others; a stream without it is whole.
            if (loaded == MigrationStatus.Completed) RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
            else Assert.That((whole, destination.Vm.RunState.State), Is.EqualTo((false, RunState.InMigrate)), $"seed {seed}: {destination.Engine.Query().Error}");
        }
    }

    private static async Task<long> Measure()
    {
        using TestVm measure = TestVm.WithRam(Size).FilledRandom(1);
        var channel = new MemoryChannel();
        await measure.Engine.Migrate(channel);
        return channel.Written.Length;
    }

    private static async Task Run(int first, int count)
    {
        long length = await Measure();
        int moved = 0, stayed = 0, held = 0;
        for (int seed = first; seed < first + count; seed++)
        {
            var random = new Random(seed);
            bool tcp = random.Next(2) == 0;
            using TestVm source = TestVm.WithRam(Size).FilledRandom(seed);
            using TestVm destination = TestVm.WithRam(Size, incoming: true);
            source.Vm.Cont();
            source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
            (IMigrationChannel a, IMigrationChannel b) = tcp ? Sockets() : Memory();
            bool atSource = random.Next(2) == 0;
            ChannelFault fault = ChannelFault.Of(random, length), none = fault with { ReadFailsAt = long.MaxValue, WriteFailsAt = long.MaxValue };
            // A destination reads the stream and writes the few bytes of the way back.
            if (!atSource) fault = fault with { ReadFailsAt = fault.WriteFailsAt, WriteFailsAt = fault.ReadFailsAt };
            Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(new FaultChannel(b, atSource ? none : fault));
            MigrationStatus sent = await source.Engine.Migrate(new FaultChannel(a, atSource ? fault : none)).WaitAsync(s_deadline);
            MigrationStatus received = await incoming.WaitAsync(s_deadline);
            bool here = source.Vm.RunState.IsRunning, there = destination.Vm.RunState.IsRunning;
            string what = $"seed {seed}, {(tcp ? "socket" : "memory")}, {fault} at the {(atSource ? "source" : "destination")}: source {sent} {source.Vm.RunState.State} ({source.Engine.Query().Error}), "
                + $"destination {received} {destination.Vm.RunState.State} ({destination.Engine.Query().Error})";
            // A destination in doubt holds the VM while the source is done or runs.
            bool isHeld = sent == MigrationStatus.Completed && !there && destination.Vm.RunState.State != RunState.InMigrate;
            Assert.That(here ^ (there || isHeld), what);
            if (there || isHeld) RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
            if (there) moved++;
            else if (isHeld) held++;
            else stayed++;
        }
        TestContext.Out.WriteLine($"{count} migrations in process: {moved} moved, {stayed} stayed, {held} held");
        Assert.That(Math.Min(moved, stayed), Is.GreaterThan(count / 10), "faults everywhere, and not always");
    }

    private static (IMigrationChannel, IMigrationChannel) Memory()
    {
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        return (a, b);
    }

    private static (IMigrationChannel, IMigrationChannel) Sockets()
    {
        (Core.Interop.OwnedFd a, Core.Interop.OwnedFd b) = Core.Interop.Posix.SocketPair();
        return (new Vmm.Migration.Channels.SocketChannel(a, "pair:source", tcp: false), new Vmm.Migration.Channels.SocketChannel(b, "pair:destination", tcp: false));
    }
}
