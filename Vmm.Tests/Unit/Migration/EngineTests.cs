using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>Invariants of the migration engine between two VMs of this process.</summary>
[TestFixture]
public class EngineTests
{
    private const ulong Size = 8 << 20;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [Test]
    public async Task ABusyVmMovesWithoutALostPage([Values] bool returnPath, [Values("memory", "tcp", "unix")] string transport)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        using var folder = new TempDirectory();
        using var writer = new BackgroundWriter(source);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath)]);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, transport, folder);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That((source.Vm.RunState.State, destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        MigrationInfo info = source.Engine.Query();
        Assert.That(info.Downtime!.TotalMs, Is.GreaterThan(0).And.LessThan(2000));
        Assert.That(info.Ram!.NormalPages, Is.GreaterThanOrEqualTo(1024));
        Assert.That(info.Ram.DuplicatePages, Is.GreaterThan(0));
    }

    [Test]
    public async Task SeveralBlocksOfDifferentSizeMove()
    {
        RamBlockOptions[] blocks =
        [
            new() { Name = "small", SizeBytes = 1 << 20 }, new() { Name = "large", SizeBytes = 24 << 20 }, new() { Name = "page", SizeBytes = 4096 },
        ];
        using var source = new TestVm(new VmOptions { Memory = blocks });
        using var destination = new TestVm(new VmOptions { Memory = [.. blocks.Reverse()], IsIncoming = true });
        source.FilledRandom(2);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "memory", null);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task ValuesMayArriveOneByteAtATime()
    {
        using TestVm source = TestVm.WithRam(64 << 10).FilledRandom(3, halfZero: true);
        using TestVm destination = TestVm.WithRam(64 << 10, incoming: true);
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(new OneByteChannel(b));
        Assert.That(await source.Engine.Migrate(a).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task CancelAtTenMomentsLeavesTheSourceRunningAndTheDestinationReady()
    {
        using TestVm source = TestVm.WithRam(32 << 20).FilledRandom(4);
        using TestVm destination = TestVm.WithRam(32 << 20, incoming: true);
        source.Vm.Cont();
        // Pause before the switchover, so that even the latest cancel comes before it.
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.PauseBeforeSwitchover, true)]);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 100 << 20, DowntimeLimitMs = 1 };
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening: true);
        var to = MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}");
        int cancelled = 0;
        for (int i = 0; i < 10; i++)
        {
            int pages = i * 600;
            Task<MigrationStatus> outgoing = source.Engine.Migrate(to);
            while (!outgoing.IsCompleted && (source.Engine.Query().Ram?.NormalPages ?? -1) < pages) Thread.Yield();
            source.Engine.Cancel();
            MigrationStatus end = await outgoing.WaitAsync(TimeSpan.FromSeconds(2));
            Assert.That(end, Is.EqualTo(MigrationStatus.Cancelled), $"attempt {i}: {source.Engine.Query().Error}");
            Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.Running));
            Assert.That(source.Engine.Query().Error, Is.Null, "a cancelled migration has no error");
            cancelled++;
        }
        Assert.That(cancelled, Is.EqualTo(10));
        source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, false)]);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 0 };
        Assert.That(await source.Engine.Migrate(to).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task ALinkCutAnywhereLeavesExactlyOneSideRunning()
    {
        long total;
        using (TestVm measure = TestVm.WithRam(256 << 10).FilledRandom(5))
        {
            var channel = new MemoryChannel();
            await measure.Engine.Migrate(channel);
            total = channel.Written.Length;
        }
        for (int i = 0; i <= 16; i++)
        {
            using TestVm source = TestVm.WithRam(256 << 10).FilledRandom(5);
            using TestVm destination = TestVm.WithRam(256 << 10, incoming: true);
            source.Vm.Cont();
            source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
            (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
            Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b);
            MigrationStatus sent = await source.Engine.Migrate(new FaultyChannel(a, total * i / 16)).WaitAsync(s_deadline);
            MigrationStatus received = await incoming.WaitAsync(s_deadline);
            bool here = source.Vm.RunState.IsRunning, there = destination.Vm.RunState.IsRunning;
            Assert.That(here ^ there, $"cut {i}: source {sent} {source.Vm.RunState.State}, destination {received} {destination.Vm.RunState.State}");
        }
    }

    [Test]
    public async Task ADestinationCannotConfirmAfterTheSourceCancelled()
    {
        using TestVm source = TestVm.WithRam(1 << 20).FilledRandom(6);
        using var destination = new TestVm(new VmOptions { IsIncoming = true, Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }] });
        // A section that blocks while it loads keeps the destination from confirming until the source has given up.
        var gate = new ManualResetEventSlim();
        var reached = new ManualResetEventSlim();
        source.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "gate", InstanceId = 0 }, SaveVmHandlers.Of(new Gate(null, null)));
        destination.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "gate", InstanceId = 0 }, SaveVmHandlers.Of(new Gate(reached, gate)));
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "tcp", null);
        Assert.That(reached.Wait(s_deadline));
        LeakCheck.WaitFor(() => source.Engine.Status == MigrationStatus.Device, "the source did not reach 'device'");
        source.Engine.Cancel();
        gate.Set();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That((source.Vm.RunState.State, destination.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.InMigrate)));
        Assert.That($"{destination.Engine.Query().Error}", Does.Contain("the source cancelled"));
    }

    [Test]
    public async Task TheDestinationsReasonReachesTheSource()
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(7);
        using TestVm destination = TestVm.WithRam(Size * 2, incoming: true);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "tcp", null);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        string here = $"{source.Engine.Query().Error}", there = $"{destination.Engine.Query().Error}";
        Assert.That(here, Is.EqualTo(there));
        Assert.That(here, Does.StartWith("destination, ").And.Contain("size differs").And.Contain("hint:"));
        Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AGarbagePeerIsNoAttemptAndTheNextOneIsServed()
    {
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening: true);
        int port = destination.Engine.Query().SocketAddresses[0].Port;
        using (var garbage = new System.Net.Sockets.TcpClient("127.0.0.1", port))
        {
            garbage.GetStream().Write("GET / HTTP/1.0\r\n\r\n"u8);
            Assert.That(() => garbage.GetStream().ReadByte(), Throws.InstanceOf<IOException>(), "the destination closes the connection with its bytes unread");
        }
        Assert.That(destination.Engine.Status, Is.EqualTo(MigrationStatus.Setup));
        using TestVm source = TestVm.WithRam(Size).FilledRandom(8);
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{port}")).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    [TestCase("file:/dev/full", "No space left on device")]
    [TestCase("exec:cat > /dev/full", "exit status")]
    [TestCase("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused")]
    [TestCase("unix:/nonexistent/socket", "Failed to connect to '/nonexistent/socket': No such file or directory")]
    public async Task ABadTargetFailsWithinASecondAndTheSourceRunsOn(string uri, string cause)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(9);
        source.Vm.Cont();
        var clock = System.Diagnostics.Stopwatch.StartNew();
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse(uri)).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(1)));
        Assert.That($"{source.Engine.Query().Error}", Does.Contain(cause));
        Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AFailedFileIsRemovedAndBytesBeforeTheOffsetAreKept()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(10);
        source.Vm.Cont();
        using IDisposable handler = source.Vm.RunState.Register(new FailingStop());
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse($"file:{folder["new"]}")), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(File.Exists(folder["new"]), Is.False);
        File.WriteAllText(folder["old"], "header");
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse($"file:{folder["old"]},offset=6")), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(File.ReadAllText(folder["old"]), Is.EqualTo("header"));
        Assert.That((await Assert.ThrowsAsync<ChannelException>(() => source.Engine.Migrate(MigrationAddress.Parse("file:/nonexistent/x"))))!.Message,
            Is.EqualTo("Could not create '/nonexistent/x': No such file or directory"));
    }

    [Test]
    public async Task AFailingStopHandlerAbortsTheMigrationAndIsNamed()
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(11);
        source.Vm.Cont();
        using (source.Vm.RunState.Register(new FailingStop()))
        {
            Assert.That(await source.Engine.Migrate(new MemoryChannel()), Is.EqualTo(MigrationStatus.Failed));
            Assert.That($"{source.Engine.Query().Error}", Does.Contain("FailingStop").And.Contain("will not stop"));
        }
        Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(await source.Engine.Migrate(new MemoryChannel()), Is.EqualTo(MigrationStatus.Completed));
    }

    [Test]
    public async Task ASecondMigrationIsRefusedWhileOneRuns()
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(12);
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair(4096);
        Task<MigrationStatus> first = source.Engine.Migrate(a);
        Assert.That(() => source.Engine.Migrate(new MemoryChannel()), Throws.TypeOf<MigrationBlockedException>().With.Message.EqualTo("There's a migration process in progress"));
        Assert.That(() => source.Vm.Snapshots().Delete("x"), Throws.TypeOf<MigrationBlockedException>());
        source.Engine.Cancel();
        Assert.That(await first.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        b.Dispose();
    }

    [Test]
    public void ABlockerRefusesAndIsListed()
    {
        using TestVm source = TestVm.WithRam(Size);
        var blockers = (MigrationBlockers)source.Vm.Services.GetService(typeof(MigrationBlockers))!;
        using (blockers.Add("device 'x' cannot move"))
        {
            Assert.That(source.Engine.Query().BlockedReasons, Is.EqualTo((string[])["device 'x' cannot move"]));
            Assert.That(() => source.Engine.Migrate(new MemoryChannel()), Throws.TypeOf<MigrationBlockedException>().With.Message.Contains("device 'x' cannot move"));
        }
        Assert.That(source.Engine.Query().BlockedReasons, Is.Empty);
    }

    [Test]
    public async Task PauseBeforeSwitchoverWaitsForContinue()
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(13);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        Task<MigrationStatus> outgoing = source.Engine.Migrate(new MemoryChannel());
        LeakCheck.WaitFor(() => source.Engine.Status == MigrationStatus.PreSwitchover, "the source did not reach pre-switchover");
        Assert.That(source.Vm.RunState.State, Is.EqualTo(RunState.FinishMigrate));
        Assert.That(() => source.Vm.Cont(), Throws.TypeOf<DeviceStateException>().With.Message.EqualTo("Migration is not finalized yet"));
        Assert.That(() => source.Engine.Continue(MigrationStatus.Device), Throws.TypeOf<ConfigurationException>());
        source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    [Test]
    public async Task APageWithoutMemoryThatIsWrittenBeforeItsFirstTurnArrives()
    {
        using TestVm source = TestVm.WithRam(Size), destination = TestVm.WithRam(Size, incoming: true);
        source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        // At this bandwidth the first half takes a while. The downtime limit lets the switchover begin before that, so the second half has not had its turn.
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 10 << 20, DowntimeLimitMs = 2_000_000 };
        new Random(16).NextBytes(source.Ram.Slice(0, (int)(Size / 2)));
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "memory", null);
        LeakCheck.WaitFor(() => source.Engine.Status == MigrationStatus.PreSwitchover, "the source did not reach pre-switchover");
        Assert.That(source.Engine.Query().Ram!.NormalPages, Is.LessThan((long)Size / 2 / 4096));
        new Random(17).NextBytes(source.Ram.Slice(Size / 2, (int)(Size / 2)));
        source.Ram.MarkDirty(Size / 2, Size / 2);
        source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task MaxBandwidthIsKept()
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(14);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 16 << 20, DowntimeLimitMs = 1 };
        var clock = System.Diagnostics.Stopwatch.StartNew();
        Assert.That(await source.Engine.Migrate(new MemoryChannel()), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(clock.Elapsed.TotalSeconds, Is.InRange(0.35, 1.5), "8 MiB at 16 MiB/s take half a second");
    }

    [Test]
    public async Task AMigrationAllocatesNothingPerPage()
    {
        using TestVm source = TestVm.WithRam(256 << 20).FilledRandom(15, halfZero: true);
        using TestVm destination = TestVm.WithRam(256 << 20, incoming: true);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 0 };
        long before = GC.GetTotalAllocatedBytes(precise: true);
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "tcp", null);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        long allocated = GC.GetTotalAllocatedBytes(precise: true) - before;
        // The migration moved 65,536 pages. Buffers and control data take well under 4 MiB, and one object per page would take more.
        Assert.That(allocated, Is.LessThan(4 << 20));
    }

    [Test, NonParallelizable]
    public async Task BuffersStaySmallWhateverTheRamSize()
    {
        // The guest has touched one page of its 64 GiB, so neither side may touch the rest.
        const ulong size = 64UL << 30;
        using TestVm source = TestVm.WithRam(size);
        using TestVm destination = TestVm.WithRam(size, incoming: true);
        source.Ram.Slice(40UL << 30, 4096).Fill(7);
        source.Engine.Parameters = source.Engine.Parameters with { MaxBandwidthBytesPerSecond = 0 };
        using var folder = new TempDirectory();
        GC.Collect();
        long before = ResidentBytes();
        long most = 0;
        (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "unix", folder);
        while (!outgoing.IsCompleted)
        {
            most = Math.Max(most, ResidentBytes() - before);
            Thread.Yield();
        }
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(destination.Ram.ReadOnlySlice(40UL << 30, 4096).IndexOfAnyExcept((byte)7), Is.EqualTo(-1));
        Assert.That(most, Is.LessThan(64 << 20), "both ends together stay small, bitmaps included");
    }

    private static long ResidentBytes()
    {
        string line = File.ReadLines("/proc/self/status").First(static l => l.StartsWith("VmRSS", StringComparison.Ordinal));
        return long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[^2]) * 1024;
    }

    [Test, NonParallelizable]
    public async Task NothingIsLeftBehind()
    {
        List<string> before = LeakCheck.SettledDescriptors();
        using (var folder = new TempDirectory())
        {
            for (int i = 0; i < 5; i++)
            {
                using TestVm source = TestVm.WithRam(Size).FilledRandom(16);
                using TestVm destination = TestVm.WithRam(Size, incoming: true);
                source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
                (Task<MigrationStatus> outgoing, Task<MigrationStatus> incoming) = Connect(source, destination, "unix", folder);
                await Task.WhenAll(outgoing, incoming).WaitAsync(s_deadline);
                Assert.That(Directory.GetFiles(folder.Path), Is.Empty, "the engine removes the socket");
                using TestVm waiting = TestVm.WithRam(Size, incoming: true);
                _ = waiting.Engine.MigrateIncoming(MigrationAddress.Parse($"unix:{folder["waiting"]}"));
            }
            Assert.That(Directory.GetFiles(folder.Path), Is.Empty, "a VM that still listened removes its socket");
        }
        LeakCheck.WaitFor(() => LeakCheck.Threads().Count == 0, $"threads: {string.Join(", ", LeakCheck.Threads())}");
        LeakCheck.NoMoreThan(before);
    }

    private static (Task<MigrationStatus> Outgoing, Task<MigrationStatus> Incoming) Connect(TestVm source, TestVm destination, string transport, TempDirectory? folder)
    {
        if (transport == "memory")
        {
            (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
            Task<MigrationStatus> waiting = destination.Engine.MigrateIncoming(b);
            return (source.Engine.Migrate(a), waiting);
        }
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse(transport == "tcp" ? "tcp:127.0.0.1:0" : $"unix:{folder!["mig"]}"));
        MigrationAddress address = destination.Engine.Query().SocketAddresses[0];
        return (source.Engine.Migrate(MigrationAddress.Parse(transport == "tcp" ? $"tcp:127.0.0.1:{address.Port}" : $"unix:{address.Path}")), incoming);
    }

    private sealed class FailingStop : IVmStateHandler
    {
        public void OnVmStateChange(bool running, RunState state)
        {
            if (!running) throw new InvalidOperationException("will not stop");
        }
    }

    private sealed class Gate(ManualResetEventSlim? reached, ManualResetEventSlim? open) : ISaveState, ILoadState
    {
        public void SaveState(QemuFileWriter f) => f.WriteByte(1);

        public void LoadState(QemuFileReader f, int versionId)
        {
            f.ReadByte();
            reached?.Set();
            open?.Wait();
        }
    }
}
