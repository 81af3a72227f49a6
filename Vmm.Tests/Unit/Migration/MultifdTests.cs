using System.Net;
using System.Net.Sockets;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Migration.Channels;
using Vmm.Migration.Multifd;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>Pages and device state move over channels of their own (stream 4; vfio-migration 3.7).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class MultifdTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [Test]
    public async Task RamMovesOverTheChannelsWhileTheGuestWrites([Values] bool returnPath)
    {
        using TestVm source = TestVm.WithRam(16 << 20).FilledRandom(1, halfZero: true), destination = TestVm.WithRam(16 << 20, incoming: true);
        source.Vm.Cont();
        using var writer = new BackgroundWriter(source);
        await Migrate(source, destination, returnPath);
        writer.Dispose();
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        RamStats ram = source.Engine.Query().Ram!;
        Assert.That(ram.MultifdBytes, Is.GreaterThanOrEqualTo(8 << 20));
        Assert.That(destination.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task TheFinalStateOfDevicesMovesOverTheChannels([Values(1, 3)] int devices)
    {
        using TestVm source = WithVfio(incoming: false), destination = WithVfio(incoming: true);
        FakeVfioPci[] from = [.. Enumerable.Range(0, devices).Select(i => VfioPair.Add(source, i, new FakeVfioDevice($"a{i}") { State = Bytes(3_000_000, i) }))];
        FakeVfioPci[] to = [.. Enumerable.Range(0, devices).Select(i => VfioPair.Add(destination, i, new FakeVfioDevice($"b{i}")))];
        foreach (FakeVfioPci one in from) one.Config.Bytes[7] = 0x42;
        source.Vm.Cont();
        await Migrate(source, destination, returnPath: true);
        Assert.That(to.Select(static d => d.Io.State), Is.EqualTo(from.Select(static d => d.Io.State)));
        Assert.That(to.Select(static d => d.Config.Bytes[7]), Is.All.EqualTo(0x42));
        Assert.That(source.Engine.Query().Ram!.MultifdBytes, Is.GreaterThanOrEqualTo(3_000_000L * devices), "the device state moves over the multifd channels");
        Assert.That(source.Engine.Query().Ram!.TransferredBytes - source.Engine.Query().Ram!.MultifdBytes, Is.LessThan(3_000_000));
    }

    [Test]
    public async Task AfterAMoveWithChannelsASecondOneGoesWithoutThem()
    {
        using TestVm first = WithVfio(incoming: false), second = WithVfio(incoming: true), third = WithVfio(incoming: true);
        VfioPair.Add(first, 0, new FakeVfioDevice("a") { State = Bytes(100_000, 7) });
        VfioPair.Add(second, 0, new FakeVfioDevice("b"));
        FakeVfioPci last = VfioPair.Add(third, 0, new FakeVfioDevice("c"));
        first.Vm.Cont();
        await Migrate(first, second, returnPath: true);
        second.Engine.SetCapabilities([new(MigrationCapability.Multifd, false)]);
        await Migrate(second, third, returnPath: true, multifd: false);
        Assert.That(last.Io.State, Is.EqualTo(Bytes(100_000, 7)));
    }

    [Test]
    public async Task ABadChannelFailsTheLoadAndTheNextAttemptSucceeds()
    {
        using TestVm source = TestVm.WithRam(1 << 20).FilledRandom(2), destination = TestVm.WithRam(1 << 20, incoming: true);
        Use(destination, returnPath: false);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        int port = destination.Engine.Query().SocketAddresses[0].Port;
        // The UUID in the last channel's preamble belongs to another VM.
        using Socket main = Connect(port, [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3, 7, 0, 0, 0, 4, .. "none"u8]),
            good = Connect(port, MultifdPacket.Preamble(Guid.Empty, 0)), bad = Connect(port, MultifdPacket.Preamble(Guid.NewGuid(), 1));
        // This type byte begins the first section and so ends the leading commands; only then does the destination read the channels.
        main.Send([1]);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(destination.Engine.Query().Error!.Message, Does.Contain("UUID of a multifd channel differs"));
        source.Vm.Cont();
        await Migrate(source, destination, returnPath: true);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task ACancelledMoveRunsOnAndMovesTheNextTime()
    {
        using TestVm source = TestVm.WithRam(8 << 20).FilledRandom(3), destination = TestVm.WithRam(8 << 20, incoming: true);
        source.Vm.Cont();
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 1 << 20 };
        Use(source, returnPath: true);
        Use(destination, returnPath: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}"));
        Assert.That(() => source.Engine.Status, Is.EqualTo(MigrationStatus.Active).After(30_000, 5));
        source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(source.Vm.RunState.IsRunning);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 0 };
        await Migrate(source, destination, returnPath: true);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public void AChannelThatGoesOneWayIsRefusedAtOnce()
    {
        using TestVm source = TestVm.WithRam(1 << 20);
        Use(source, returnPath: false);
        Assert.That(() => source.Engine.Migrate(MigrationAddress.Parse("file:/tmp/never")), Throws.Exception.With.Message.Contains("requires multi-channel URIs"));
    }

    [Test]
    public async Task OnAtTheSourceOnlyIsRefusedAtOnceAndTheSourceRunsOn([Values(2, 64)] int sizeMiB)
    {
        using TestVm source = TestVm.WithRam((ulong)sizeMiB << 20).FilledRandom(4), destination = TestVm.WithRam((ulong)sizeMiB << 20, incoming: true);
        source.Vm.Cont();
        Use(source, returnPath: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}"));
        Assert.That(await outgoing.WaitAsync(TimeSpan.FromSeconds(3)), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(TimeSpan.FromSeconds(3)), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(source.Vm.RunState.IsRunning);
        Assert.That(destination.Engine.Query().Error!.Message, Does.Contain("the source opened at least 2 multifd channels").And.Contain("multifd is off here"));
        Assert.That(source.Engine.Query().Error!.Message, Does.Contain("multifd is off here"), "the destination tells the source the reason");
    }

    [Test]
    public async Task OnAtTheDestinationOnlyIsRefusedAfterADeadline()
    {
        using TestVm source = TestVm.WithRam(16 << 20).FilledRandom(5), destination = TestVm.WithRam(16 << 20, incoming: true);
        source.Vm.Cont();
        Use(destination, returnPath: true);
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}"));
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(source.Vm.RunState.IsRunning);
        Assert.That(source.Engine.Query().Error!.Message, Does.Contain("the source opened 0 multifd channels").And.Contain("2 are expected here"));
    }

    /// <summary>
    /// With some of these sizes the source has queued everything, and the kernel's buffers are full. A cancel then waits for the destination, which does
    /// not answer.
    /// </summary>
    [Test]
    public async Task ACancelWhileNobodyReadsTheChannelsEndsCancelled([Values(2, 4, 6, 8, 10, 12)] int sizeMiB)
    {
        using TestVm source = TestVm.WithRam((ulong)sizeMiB << 20).FilledRandom(6);
        source.Vm.Cont();
        Use(source, returnPath: true);
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{((IPEndPoint)listener.LocalEndpoint).Port}"));
        using Socket main = await listener.AcceptSocketAsync();
        Task reading = Task.Run(() =>
        {
            byte[] waste = new byte[1 << 16];
            while (main.Receive(waste) > 0) { }
        });
        // With the larger sizes the source never reaches this status.
        SpinWait.SpinUntil(() => source.Engine.Status == MigrationStatus.Device, TimeSpan.FromSeconds(4));
        source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(TimeSpan.FromSeconds(20)), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(source.Engine.Status, Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(source.Vm.RunState.IsRunning);
        main.Dispose();
        await reading.WaitAsync(s_deadline).ContinueWith(static _ => { }, TaskScheduler.Default);
    }

    private static TestVm WithVfio(bool incoming) => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }], IsIncoming = incoming }, static b => b.AddPlugin<VfioPlugin>());

    private static void Use(TestVm vm, bool returnPath) =>
        vm.Engine.SetCapabilities([new(MigrationCapability.Multifd, true), new(MigrationCapability.ReturnPath, returnPath)]);

    private static async Task Migrate(TestVm source, TestVm destination, bool returnPath, bool multifd = true)
    {
        if (multifd)
        {
            Use(source, returnPath);
            Use(destination, returnPath);
        }
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        MigrationStatus sent = await source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}")).WaitAsync(s_deadline);
        string Reasons() => $"{source.Engine.Query().Error} / {destination.Engine.Query().Error}";
        Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), Reasons);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), Reasons);
    }

    private static Socket Connect(int port, byte[] first)
    {
        var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        socket.Connect(IPAddress.Loopback, port);
        socket.Send(first);
        return socket;
    }

    private static byte[] Bytes(int count, int seed)
    {
        byte[] bytes = new byte[count];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }
}
