using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Outgoing;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Cpr;

/// <summary>
/// One VM of this process hands its guest over to another. The tests check which of the two has the guest when something goes wrong, and what the
/// old VM refuses afterwards.
/// </summary>
internal sealed class CprHandOverTests
{
    private const ulong Size = 64 << 10;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);
    private TempDirectory _folder = null!;
    private TestVm _from = null!;
    private MigrationAddress _main = null!, _cpr = null!;

    [SetUp]
    public void SetUp()
    {
        _folder = new TempDirectory();
        (_main, _cpr) = (MigrationAddress.Parse($"unix:{_folder["main"]}"), MigrationAddress.Parse($"unix:{_folder["cpr"]}"));
        _from = TestVm.WithRam(Size).FilledRandom(1);
        _from.Engine.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        _from.Vm.Cont();
    }

    [TearDown]
    public void TearDown()
    {
        _from.Dispose();
        _folder.Dispose();
    }

    [Test]
    public async Task WhoGaveAVmAwayNeitherRunsNorResetsIt()
    {
        (Task<MigrationStatus> outgoing, CprTransferReceiver receiver) = await HandOver();
        using TestVm to = Make(receiver);
        Task<MigrationStatus> incoming = to.Engine.MigrateIncoming(_main);
        receiver.Dispose();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{_from.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That((_from.Vm.RunState.State, to.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
        Assert.That(_from.Vm.Cont, Throws.TypeOf<DeviceStateException>().With.Message.Contains("another process"));
        Assert.That(_from.Vm.Reset, Throws.TypeOf<DeviceStateException>().With.Message.Contains("another process"));
        Assert.That(_from.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
    }

    [TestCase(true)]
    [TestCase(false)]
    public async Task ADescriptorThatCameOrWentSinceStopsTheHandOver(bool comes)
    {
        using OwnedFd fd = Posix.EventFd();
        using IDisposable? there = comes ? null : _from.Vm.CprFds.Save("dev0_interrupt", 3, fd);
        (Task<MigrationStatus> outgoing, CprTransferReceiver receiver) = await HandOver();
        using TestVm to = Make(receiver);
        Task<MigrationStatus> incoming = to.Engine.MigrateIncoming(_main);
        there?.Dispose();
        using IDisposable? came = comes ? _from.Vm.CprFds.Save("dev0_interrupt", 3, fd) : null;
        receiver.Dispose();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(_from.Engine.Query().Error!.Message, Does.Contain("descriptors of the VM changed"));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That((_from.Vm.RunState.State, to.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.InMigrate)));
        Assert.That(_from.Vm.Reset, Throws.Nothing);
    }

    /// <summary>Without a return path, a destination that has read everything and then closes its connection must not look like success.</summary>
    [Test]
    public async Task WithoutTheCapabilityAFailedLoadIsStillAFailure()
    {
        _from.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, false)]);
        using IDisposable here = Section(_from);
        (Task<MigrationStatus> outgoing, CprTransferReceiver receiver) = await HandOver();
        using TestVm to = Make(receiver);
        using IDisposable there = Section(to);
        Task<MigrationStatus> incoming = to.Engine.MigrateIncoming(_main);
        receiver.Dispose();
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(_from.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AReceiverThatTakesNothingHoldsNobody()
    {
        using OwnedFd fd = Posix.EventFd();
        for (int i = 0; i < 4000; i++) _from.Vm.CprFds.Save("dev0_interrupt", i, fd);
        using var listener = MigrationListener.Listen(_cpr);
        Task<MigrationStatus> outgoing = _from.Engine.Migrate(_main, _cpr);
        using OwnedFd? accepted = listener.AcceptFd();
        _from.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(_from.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public void MoreDescriptorsThanAReaderTakesAreRefusedBeforeTheStop()
    {
        using OwnedFd fd = Posix.EventFd();
        CprFd[] many = [.. Enumerable.Range(0, 4097).Select(i => new CprFd("dev0_interrupt", i, fd))];
        Assert.That(() => CprState.ToParts(many, []), Throws.TypeOf<StreamLimitException>().With.Message.Contains("4097"));
        Assert.That(() => CprState.ToBytes(many, []), Throws.TypeOf<StreamLimitException>().With.Message.Contains("4097"));
    }

    /// <summary>Two VFIO groups share a container, so one descriptor has two names.</summary>
    [Test]
    public void ADescriptorUnderTwoNamesSurvivesAnExec()
    {
        OwnedFd fd = Posix.EventFd();
        byte[] bytes = CprState.ToBytes([new CprFd("vfio_container_for_group", 7, fd), new CprFd("vfio_container_for_group", 8, fd)], []);
        int number = fd.Number;
        fd.SetHandleAsInvalid(); // As after an exec, the descriptor is open and no object owns it.
        var claimed = new Dictionary<int, OwnedFd>();
        using CprIncoming read = CprState.Parse(bytes, MigrationMode.CprExec, n => CprExec.Claim(n, claimed));
        Assert.That(read.Fds.Select(static f => f.Id), Is.EqualTo(new[] { 7, 8 }));
        Assert.That(read.Fds[0].Fd.Number, Is.EqualTo(number));
        Assert.That(read.Fds[1].Fd.Number, Is.Not.EqualTo(number), "each name has its own descriptor");
        read.Fds[0].Fd.Dispose();
        Assert.That(Posix.IsOpen(read.Fds[1].Fd.Number));
    }

    [Test]
    public void ADeviceThatFailsDoesNotKeepTheOthersFromGoingOn()
    {
        var notifiers = new MigrationNotifiers();
        var called = new List<int>();
        for (int i = 0; i < 3; i++)
        {
            int n = i;
            notifiers.Add(_ => { called.Add(n); if (n != 1) throw new DeviceStateException($"device {n}"); }, MigrationModes.CprTransfer);
        }
        Assert.That(() => notifiers.Notify(MigrationEvent.PrecopyFailed, MigrationMode.CprTransfer), Throws.TypeOf<DeviceStateException>().With.Message.EqualTo("device 0"));
        Assert.That(called, Is.EqualTo(new[] { 0, 1, 2 }));
        called.Clear();
        Assert.That(() => notifiers.Notify(MigrationEvent.PrecopySetup, MigrationMode.CprTransfer), Throws.TypeOf<DeviceStateException>());
        Assert.That(called, Is.EqualTo(new[] { 0 }), "before a migration the first refusal ends the notification");

        using var table = new CprFdTable();
        table.Receive(new CprIncoming(MigrationMode.CprTransfer, [], []));
        table.Arrived += static () => throw new DeviceStateException("first");
        table.Arrived += () => called.Add(9);
        Assert.That(table.EndIncoming, Throws.TypeOf<DeviceStateException>());
        Assert.That(called, Does.Contain(9));
    }

    /// <summary>Once the destination runs, a late cancel or yank must not make the source run again.</summary>
    [TestCase(false)]
    [TestCase(true)]
    public async Task WhatTheDestinationConfirmedIsItsOwn(bool yank)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(2);
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b);
        bool tooLate = false;
        int writes = 0;
        var late = new LateChannel(a, () =>
        {
            // The source writes everything after the stop in one piece, and its final word in another.
            if (source.Vm.RunState.State != RunState.FinishMigrate || ++writes < 2 || !incoming.Wait(s_deadline)) return;
            tooLate = true;
            if (yank) source.Engine.Yank();
            else source.Engine.Cancel();
        });
        Assert.That(await source.Engine.Migrate(late).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming, Is.EqualTo(MigrationStatus.Completed));
        Assert.That(tooLate);
        Assert.That((source.Vm.RunState.State, destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
        Assert.That(source.Engine.Query().Downtime, Is.Not.Null);
    }

    private async Task<(Task<MigrationStatus> Outgoing, CprTransferReceiver Receiver)> HandOver()
    {
        Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(_cpr, CancellationToken.None));
        Assert.That(SpinWait.SpinUntil(() => File.Exists(_cpr.Path), s_deadline));
        Task<MigrationStatus> outgoing = _from.Engine.Migrate(_main, _cpr);
        return (outgoing, await receiving.WaitAsync(s_deadline));
    }

    private static IDisposable Section(TestVm vm) =>
        vm.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "broken", InstanceId = 0, VersionId = 1, MinimumVersionId = 1 }, SaveVmHandlers.Of(new Broken()));

    private static TestVm Make(CprTransferReceiver receiver) =>
        new(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size }], IsIncoming = true, Cpr = receiver.Incoming });

    /// <summary>A section that saves and then fails to load.</summary>
    private sealed class Broken : ISaveState, ILoadState
    {
        public void SaveState(QemuFileWriter f) => f.WriteByte(1);

        public void LoadState(QemuFileReader f, int versionId) => throw new DeviceStateException("it does not load");
    }

    /// <summary>Runs an action right after each of the source's writes, while the source waits.</summary>
    private sealed class LateChannel(InMemoryChannel inner, Action behind) : IMigrationChannel
    {
        public string Name => inner.Name;

        public bool IsBidirectional => inner.IsBidirectional;

        public bool PeerHasClosed => inner.PeerHasClosed;

        public int Read(Span<byte> destination) => inner.Read(destination);

        public void Write(ReadOnlySpan<byte> source)
        {
            inner.Write(source);
            behind();
        }

        public void WriteGather(GatherList parts)
        {
            inner.WriteGather(parts);
            behind();
        }

        public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

        public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

        public void Dispose() => inner.Dispose();
    }
}
