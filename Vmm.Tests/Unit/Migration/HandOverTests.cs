using System.Net;
using System.Net.Sockets;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>The last exchange and the deadlines (STREAM.md, the hand-over), with real sockets and a relay that fails at a chosen byte.</summary>
[TestFixture]
public sealed class HandOverTests
{
    private const ulong Size = 1 << 20;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    private TestVm _source = null!, _destination = null!;
    private List<RunState> _sourceStates = [];

    [SetUp]
    public void SetUp()
    {
        _source = TestVm.WithRam(Size).FilledRandom(11);
        _destination = TestVm.WithRam(Size, incoming: true);
        _sourceStates = [];
        _source.Vm.Cont();
        _source.Vm.RunState.Changed += (_, to) => _sourceStates.Add(to);
        _source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
    }

    [TearDown]
    public void TearDown()
    {
        _source.Dispose();
        _destination.Dispose();
    }

    [Test]
    public async Task ARelayThatDiesWithTheConfirmationLeavesTheSourceRunning()
    {
        using TcpRelay relay = Relay(back: true, TcpRelay.Confirmation, RelayFault.Die, out Task<MigrationStatus> incoming);
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.Paused)));
        AssertHeld(_destination);
    }

    [Test]
    public async Task ARelayThatDiesWithTheFinalWordLeavesAVmThatAnOperatorStarts()
    {
        using TcpRelay relay = Relay(back: false, TcpRelay.FinalWord, RelayFault.Die, out Task<MigrationStatus> incoming);
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Completed), () => $"{_source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Paused)));
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("final word").And.Contain("cont --force"));
        AssertHeld(_destination);
        _destination.Vm.Cont(force: true);
        Assert.That(_destination.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(_destination.Vm.HeldBecause, Is.Null);
        RamAssert.AreEqual(_source.Vm.Memory, _destination.Vm.Memory);
    }

    /// <summary>The way back is lost: the source's deadline ends the attempt, the destination is told, and takes the next migration.</summary>
    [Test]
    public async Task ASourceThatHearsNothingGoesOnAndTheDestinationIsFree()
    {
        _source.Engine.Parameters = _source.Engine.Parameters with { ConfirmTimeoutMs = 300 };
        using TcpRelay relay = Relay(back: true, TcpRelay.Confirmation, RelayFault.MuteThisWay, out Task<MigrationStatus> incoming);
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_source.Engine.Query().Error}", Does.Contain("has not confirmed within 0.3 s").And.Contain("x-confirm-timeout"));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        LeakCheck.WaitFor(() => _destination.Engine.Status == MigrationStatus.Failed, "the destination did not learn that the source keeps the VM");
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("the source cancelled"));
        Assert.That((_destination.Vm.RunState.State, _destination.Vm.HeldBecause), Is.EqualTo((RunState.InMigrate, (string?)null)));
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Completed), () => $"{_source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    /// <summary>Both ways are lost behind the confirmation.</summary>
    [Test]
    public async Task ADestinationThatHearsNothingKeepsTheVm()
    {
        _source.Engine.Parameters = _source.Engine.Parameters with { ConfirmTimeoutMs = 300 };
        _destination.Engine.Parameters = _destination.Engine.Parameters with { FinalWordTimeoutMs = 400 };
        using TcpRelay relay = Relay(back: true, TcpRelay.Confirmation, RelayFault.Mute, out Task<MigrationStatus> incoming);
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.Paused)));
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("x-final-word-timeout").Or.Contain("final word has not come"));
        AssertHeld(_destination);
    }

    /// <summary>A source without a return path never learns that its last sections are lost, so only the destination can end its wait.</summary>
    [Test]
    public async Task ASourceThatFallsSilentAfterItsStopEndsTheLoadWithoutAReturnPathToo()
    {
        using var folder = new TempDirectory();
        _source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, false)]);
        Assert.That(await _source.Engine.Migrate(MigrationAddress.Parse($"file:{folder["stream"]}")).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        byte[] stream = await File.ReadAllBytesAsync(folder["stream"]);
        byte[] section = "globalstate"u8.ToArray();
        int inBody = stream.AsSpan().IndexOf(section) + section.Length + 10;
        _destination.Engine.Parameters = _destination.Engine.Parameters with { FinalWordTimeoutMs = 300 };
        Task<MigrationStatus> incoming = _destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        using var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        await socket.ConnectAsync(IPAddress.Loopback, _destination.Engine.Query().SocketAddresses[0].Port);
        await socket.SendAsync(stream.AsMemory(0, inBody));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("has sent nothing for 0.3 s").And.Contain("x-final-word-timeout"));
        Assert.That((_destination.Vm.RunState.State, _destination.Vm.HeldBecause), Is.EqualTo((RunState.InMigrate, (string?)null)));
    }

    /// <summary>A source that stands still between the last byte and the answer finds the answer when it goes on, and the destination still waits.</summary>
    [TestCase(true)]
    [TestCase(false)]
    public async Task ALateWordIsStillTaken(bool confirmation)
    {
        using TcpRelay relay = Relay(confirmation, confirmation ? TcpRelay.Confirmation : TcpRelay.FinalWord, RelayFault.Delay, out Task<MigrationStatus> incoming);
        Task<MigrationStatus> outgoing = Migrate(relay.Port);
        Assert.That(relay.Happened.Wait(s_deadline));
        Assert.That(_destination.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        Assert.That(incoming.IsCompleted, Is.False);
        relay.GoOn();
        Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
    }

    /// <summary>A cancel behind the last byte is one: the destination does not get the final word.</summary>
    [Test]
    public async Task ACancelWhileTheConfirmationIsOnItsWayKeepsTheVmHere()
    {
        using TcpRelay relay = Relay(back: true, TcpRelay.Confirmation, RelayFault.Delay, out Task<MigrationStatus> incoming);
        Task<MigrationStatus> outgoing = Migrate(relay.Port);
        Assert.That(relay.Happened.Wait(s_deadline));
        _source.Engine.Cancel();
        Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        relay.GoOn();
        LeakCheck.WaitFor(() => _destination.Engine.Status == MigrationStatus.Failed, "the destination did not learn of the cancel");
        Assert.That((_destination.Vm.RunState.State, _destination.Vm.HeldBecause), Is.EqualTo((RunState.InMigrate, (string?)null)));
        Assert.That(incoming.IsCompleted, Is.False, "the destination waits for the next migration");
    }

    /// <summary>Without a return path the destination runs when it has everything, and nobody asks; so a cancel behind the last byte comes too late.</summary>
    [Test]
    public async Task ACancelBehindTheLastByteWithoutReturnPathComesTooLate()
    {
        var gate = new Gate();
        using IDisposable sent = _source.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "gate", InstanceId = 0 }, SaveVmHandlers.Of(gate));
        using IDisposable taken = _destination.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "gate", InstanceId = 0 }, SaveVmHandlers.Of(gate));
        _source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, false)]);
        Task<MigrationStatus> incoming = Listen(out int port), outgoing = Migrate(port);
        Assert.That(gate.Reached.Wait(s_deadline));
        _source.Engine.Cancel();
        Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Completed));
        gate.Open.Set();
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
    }

    /// <summary>The destination's operator cancels while the final word is on its way: the VM is complete, so it is kept.</summary>
    [Test]
    public async Task ACancelAtTheDestinationBehindTheConfirmationKeepsTheVm()
    {
        using TcpRelay relay = Relay(back: false, TcpRelay.FinalWord, RelayFault.Delay, out Task<MigrationStatus> incoming);
        Task<MigrationStatus> outgoing = Migrate(relay.Port);
        Assert.That(relay.Happened.Wait(s_deadline));
        _destination.Engine.Cancel();
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        AssertHeld(_destination);
        relay.GoOn();
        Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Completed));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
        _destination.Vm.Cont(force: true);
        Assert.That(_destination.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task AHandlerThatCannotStartIsAskedBeforeTheConfirmation()
    {
        using IDisposable registration = _destination.Vm.RunState.Register(new Handler(canStart: false, failures: 0));
        Task<MigrationStatus> incoming = Listen(out int port);
        Assert.That(await Migrate(port), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_source.Engine.Query().Error}", Does.StartWith("destination, confirm:").And.Contain("has no power"));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.InMigrate)));
        Assert.That(incoming.IsCompleted, Is.False);
    }

    [Test]
    public async Task AHandlerThatFailsTheStartAfterAllLeavesAMovedVmThatContStarts()
    {
        using IDisposable registration = _destination.Vm.RunState.Register(new Handler(canStart: true, failures: 1));
        Task<MigrationStatus> incoming = Listen(out int port);
        Assert.That(await Migrate(port), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That((_source.Vm.RunState.State, _destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Paused)));
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("has no power"));
        _destination.Vm.Cont();
        Assert.That(_destination.Vm.RunState.IsRunning);
    }

    /// <summary>A destination that is busy takes the connection into its kernel's queue and reads nothing: the guest must not stop for it.</summary>
    [Test]
    public async Task AGuestIsNotStoppedForADestinationThatHasNotAnswered()
    {
        _source.Engine.Parameters = _source.Engine.Parameters with { SetupTimeoutMs = 500 };
        var busy = new TcpListener(IPAddress.Loopback, 0);
        busy.Start();
        Assert.That(await Migrate(((IPEndPoint)busy.LocalEndpoint).Port), Is.EqualTo(MigrationStatus.Failed));
        busy.Stop();
        Assert.That($"{_source.Engine.Query().Error}", Does.Contain("has not answered for 0.5 s").And.Contain("x-setup-timeout"));
        Assert.That(_sourceStates, Is.Empty, "the guest ran all the time");
        Assert.That(_source.Vm.RunState.IsRunning);
    }

    /// <summary>The link goes mute at the first answer: both sides give up by their deadlines, the source runs, the destination takes the next migration.</summary>
    [Test]
    public async Task AMuteLinkEndsBothSidesWithinTheirDeadlines()
    {
        _source.Engine.Parameters = _source.Engine.Parameters with { SetupTimeoutMs = 600, ProgressTimeoutMs = 600 };
        _destination.Engine.Parameters = _destination.Engine.Parameters with { SetupTimeoutMs = 700, ProgressTimeoutMs = 700 };
        byte[] answer = [0, 2, 0, 4, 0x76, 0x6d, 0x6d, 1];
        using TcpRelay relay = Relay(back: true, answer, RelayFault.Mute, out Task<MigrationStatus> incoming);
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(_source.Vm.RunState.IsRunning);
        Assert.That(_sourceStates, Is.Empty);
        LeakCheck.WaitFor(() => _destination.Engine.Status == MigrationStatus.Failed, "the destination waits for ever");
        Assert.That($"{_destination.Engine.Query().Error}", Does.Contain("has sent nothing for 0.7 s"));
        Assert.That(_destination.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        Assert.That(await Migrate(relay.Port), Is.EqualTo(MigrationStatus.Completed), () => $"{_source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    /// <summary>PINGs keep both sides from giving up while an operator thinks.</summary>
    [Test]
    public async Task AWaitForTheOperatorIsNotSilence()
    {
        _source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        _source.Engine.Parameters = _source.Engine.Parameters with { ProgressTimeoutMs = 3000, SwitchoverTimeoutMs = 3000 };
        _destination.Engine.Parameters = _destination.Engine.Parameters with { ProgressTimeoutMs = 3000 };
        Task<MigrationStatus> incoming = Listen(out int port);
        Task<MigrationStatus> outgoing = Migrate(port);
        LeakCheck.WaitFor(() => _source.Engine.Status == MigrationStatus.PreSwitchover, "the source did not reach pre-switchover");
        Assert.That(() => Task.WhenAny(outgoing, incoming).WaitAsync(TimeSpan.FromSeconds(5)), Throws.TypeOf<TimeoutException>(), "a side gave up while the operator thought");
        _source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    [Test]
    public async Task ACancelRightAfterTheStartOfAnIncomingMigrationIsKept([Values(0, 1, 2, 3, 4)] int attempt, [Values] bool dispose)
    {
        (Vmm.Core.Channels.InMemoryChannel a, Vmm.Core.Channels.InMemoryChannel b) = Vmm.Core.Channels.InMemoryChannel.CreatePair();
        using (a)
        {
            Task<MigrationStatus> incoming = _destination.Engine.MigrateIncoming(b);
            for (int i = 0; i < attempt * 100; i++) Thread.SpinWait(10);
            if (dispose) await Task.Run(_destination.Dispose).WaitAsync(s_deadline);
            else _destination.Engine.Cancel();
            Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        }
    }

    [Test]
    public async Task AVmIsDisposedInsideACallback([Values(MigrationStatus.Setup, MigrationStatus.Active, MigrationStatus.Device, MigrationStatus.Completed)] MigrationStatus at, [Values] bool source)
    {
        TestVm mine = source ? _source : _destination;
        if (!source && at == MigrationStatus.Device) at = MigrationStatus.Active; // A destination has no status device.
        var disposed = new TaskCompletionSource();
        mine.Engine.StatusChanged += status =>
        {
            if (status != at) return;
            mine.Vm.Dispose();
            disposed.TrySetResult();
        };
        (Vmm.Core.Channels.InMemoryChannel a, Vmm.Core.Channels.InMemoryChannel b) = Vmm.Core.Channels.InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = _destination.Engine.MigrateIncoming(b);
        Task<MigrationStatus> outgoing = _source.Engine.Migrate(a);
        await disposed.Task.WaitAsync(s_deadline);
        MigrationStatus sent = await outgoing.WaitAsync(s_deadline), received = await incoming.WaitAsync(s_deadline);
        if (at == MigrationStatus.Completed) Assert.That((sent, received), Is.EqualTo((MigrationStatus.Completed, MigrationStatus.Completed)));
        else Assert.That(source ? sent : received, Is.Not.EqualTo(MigrationStatus.Active));
        await Task.Run(mine.Dispose).WaitAsync(s_deadline);
    }

    [Test]
    public async Task AHandlerOfStatusChangedThatThrowsChangesNothing()
    {
        _source.Engine.StatusChanged += static _ => throw new InvalidOperationException("thrown");
        _destination.Engine.StatusChanged += static _ => throw new InvalidOperationException("thrown");
        Task<MigrationStatus> incoming = Listen(out int port);
        Assert.That(await Migrate(port), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(_destination.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task ACleanupThatThrowsDoesNotUndoAMove([Values] bool fails)
    {
        using IDisposable registration = _source.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "x", InstanceId = 0 }, SaveVmHandlers.Of(new FailingCleanup()));
        using IDisposable other = _destination.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = fails ? "y" : "x", InstanceId = 0 }, SaveVmHandlers.Of(new FailingCleanup()));
        Task<MigrationStatus> incoming = Listen(out int port);
        Assert.That(await Migrate(port), Is.EqualTo(fails ? MigrationStatus.Failed : MigrationStatus.Completed));
        if (!fails) Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That((_source.Vm.RunState.IsRunning, _destination.Vm.RunState.IsRunning), Is.EqualTo((fails, !fails)));
    }

    private static void AssertHeld(TestVm vm)
    {
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused));
        Assert.That(vm.Vm.HeldBecause, Is.Not.Null);
        Assert.That(vm.Vm.Cont, Throws.TypeOf<DeviceStateException>().With.Property("Hint").Contains("--force"));
        Assert.That(vm.Vm.Reset, Throws.TypeOf<DeviceStateException>());
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused));
    }

    private Task<MigrationStatus> Listen(out int port)
    {
        Task<MigrationStatus> incoming = _destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening: true);
        port = _destination.Engine.Query().SocketAddresses[0].Port;
        return incoming;
    }

    private TcpRelay Relay(bool back, byte[] at, RelayFault fault, out Task<MigrationStatus> incoming)
    {
        incoming = Listen(out int port);
        return new TcpRelay(port, back, at, fault);
    }

    private Task<MigrationStatus> Migrate(int port) => _source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{port}")).WaitAsync(s_deadline);

    private sealed class Handler(bool canStart, int failures) : IVmStateHandler
    {
        private int _failures = failures;

        public void ThrowIfCannotStart()
        {
            if (!canStart) throw new DeviceStateException("the device has no power");
        }

        public void OnVmStateChange(bool running, RunState state)
        {
            if (running && _failures-- > 0) throw new DeviceStateException("the device has no power");
        }
    }

    /// <summary>A section whose load waits. The source has sent everything when the destination comes to it, because the last sections leave in one write.</summary>
    private sealed class Gate : ISaveState, ILoadState
    {
        internal ManualResetEventSlim Reached { get; } = new();

        internal ManualResetEventSlim Open { get; } = new();

        public void SaveState(QemuFileWriter f) => f.WriteByte(1);

        public void LoadState(QemuFileReader f, int versionId)
        {
            f.ReadByte();
            Reached.Set();
            Open.Wait(s_deadline);
        }
    }

    private sealed class FailingCleanup : ISaveState, ILoadState, ISaveCleanup
    {
        public void SaveState(QemuFileWriter f) => f.WriteByte(1);

        public void LoadState(QemuFileReader f, int versionId) => f.ReadByte();

        public void SaveCleanup() => throw new InvalidOperationException("cleanup failed");
    }
}
