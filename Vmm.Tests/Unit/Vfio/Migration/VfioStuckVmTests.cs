using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>
/// Whatever a device does in an attempt to save or load its VM, the attempt fails if the device's state may be cut, and the VM can go on: it runs, or it is
/// paused and <c>cont</c>, perhaps after <c>system_reset</c>, starts it.
/// </summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioStuckVmTests
{
    private const VfioMigrationFlags All = VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy;

    public enum Kind
    {
        V1,
        V2,
        V2WithoutPrecopy,
    }

    [Test]
    public async Task ADeviceThatIsLostBeforeTheSwitchoverFailsTheMigrationAndTheVmRunsOn([Values] Kind kind, [Values] bool cancel)
    {
        using VfioPair pair = Pair(kind);
        Task<(MigrationStatus, MigrationStatus)> moving = await ToPreSwitchover(pair);
        pair.From.Io.Lose(new DeviceStateException("its server died"));
        if (cancel) pair.Source.Engine.Cancel();
        else pair.Source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That((await moving).Item1, Is.EqualTo(cancel ? MigrationStatus.Cancelled : MigrationStatus.Failed));
        if (!cancel) Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("'vfio0' (source-device) is gone: its server died"));
        Vm vm = pair.Source.Vm;
        Assert.That((vm.RunState.State, pair.Destination.Vm.RunState.IsRunning), Is.EqualTo((RunState.Running, false)));
        vm.Stop();
        vm.Cont();
        vm.Reset();
        Assert.That(vm.RunState.State, Is.EqualTo(RunState.Running), "stop, cont and system_reset work without the device");
        pair.Source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, false)]);
        (InMemoryChannel a, _) = InMemoryChannel.CreatePair();
        Assert.That(await pair.Source.Engine.Migrate(a).WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed), "nobody has the device's state");
        Assert.That(vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task ABrokenDeviceLeavesThePausedVmThatAResetMends([Values] bool cancel)
    {
        using VfioPair pair = Pair(Kind.V2);
        Task<(MigrationStatus, MigrationStatus)> moving = await ToPreSwitchover(pair);
        FakeVfioDevice device = pair.From.Io;
        (device.Refuse[VfioDeviceState.Stop], device.ResetAnswer) = (Errno.EIO, Errno.EIO);
        if (cancel) pair.Source.Engine.Cancel();
        else pair.From.Io.ReadState = static _ => throw new DeviceStateException("the device cannot be read");
        if (!cancel) pair.Source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That((await moving).Item1, Is.EqualTo(MigrationStatus.Failed), "a cancelled migration leaves a VM that goes on");
        Vm vm = pair.Source.Vm;
        Assert.That(vm.RunState.State, Is.EqualTo(RunState.Paused), "not finish-migrate, out of which no command leads");
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("the VM could not be started again and is paused").And.Contain("broken").And.Contain(cancel ? "cancelled" : "cannot be read"));
        Assert.That(vm.Cont, Throws.TypeOf<DeviceStateException>().With.Message.Contains("broken; reset the VM"));
        device.ResetAnswer = Errno.None;
        vm.Reset();
        vm.Cont();
        Assert.That((vm.RunState.State, pair.From.State), Is.EqualTo((RunState.Running, VfioDeviceState.Running)));
    }

    [Test]
    public async Task AStopThatFailsFailsTheMigration([Values] Kind kind)
    {
        using VfioPair pair = Pair(kind);
        using var reached = new ManualResetEventSlim();
        FakeVfioDevice device = pair.From.Io;
        // The device says that it has more state than fits into the downtime, which keeps the migration active until the stop.
        pair.Source.Engine.Parameters = pair.Source.Engine.Parameters with { DowntimeLimitMs = 1, MaxBandwidthBytesPerSecond = 40_000 };
        device.DataSize = 1UL << 50;
        if (device.V1 is not null) device.V1.LiesAboutPending = true;
        pair.Source.Engine.StatusChanged += s => { if (s == MigrationStatus.Active) reached.Set(); };
        Task<(MigrationStatus, MigrationStatus)> moving = pair.Migrate();
        Assert.That(reached.Wait(VfioPair.Deadline));
        if (device.V1 is { } v1) v1.RefuseAt = 2;
        else device.Refuse[kind == Kind.V2 ? VfioDeviceState.PreCopyP2P : VfioDeviceState.Stop] = Errno.EBUSY;
        Assert.That(pair.Source.Vm.Stop, Throws.TypeOf<DeviceStateException>().With.Message.Contains("could not stop the VM"));
        pair.Source.Engine.Parameters = pair.Source.Engine.Parameters with { DowntimeLimitMs = 2_000_000, MaxBandwidthBytesPerSecond = 0 };
        Assert.That(await moving, Is.EqualTo((MigrationStatus.Failed, MigrationStatus.Failed)), "a device that was reset has lost its state");
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("could not stop the VM").And.Contain("EBUSY"));
        Assert.That(pair.Source.Vm.RunState.State, Is.EqualTo(RunState.Paused), "as the user asked");
        pair.Source.Vm.Cont();
        pair.AssertOneSideRuns(atSource: true);
        if (device.V1 is not null) (device.V1.RefuseAt, device.V1.LiesAboutPending) = (null, false);
        device.DataSize = null;
        await pair.MigrateWell();
        pair.AssertOneSideRuns(atSource: false);
    }

    [Test]
    public void ASnapshotThatFailsEndsInTheDeviceToo([Values(1, 2)] int version, [Values("never ran", "paused", "runs")] string before)
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder, ram: 1 << 20);
        byte[] state = VfioMigrationTests.Bytes(5000, 1);
        FakeV1Region? region = version == 1 ? new FakeV1Region(4096) { Data = state, ChunkBytes = 700 } : null;
        var io = new FakeVfioDevice("a", All) { State = state, V1 = region };
        FakeVfioPci device = VfioPair.Add(vm, 0, io);
        vm.FilledRandom(1);
        if (before != "never ran") vm.Vm.Cont();
        if (before == "paused") vm.Vm.Stop();
        var events = new List<MigrationEvent>();
        using IDisposable heard = vm.FullEngine.Context.Notifiers.Add(events.Add);
        RunState state0 = vm.Vm.RunState.State;
        // The second read of the device's data fails, when a part of them is in the file.
        int reads = 0;
        if (region is null) io.Step = (_, next) => { if (next == VfioDeviceState.StopCopy) io.FailAt = io.Calls.Count + 1; };
        else region.Reading = () => ++reads == 4 ? Errno.EIO : Errno.None;
        Assert.That(() => Save(vm, "bad"), Throws.InstanceOf<VmmException>());
        Assert.That(events, Is.EqualTo((MigrationEvent[])[MigrationEvent.PrecopySetup, MigrationEvent.PrecopyFailed]));
        Assert.That(VfioStateArcs.HasData(device.State), Is.False, $"{device.State} after a snapshot that failed");
        if (region is not null) Assert.That(region.State & 2, Is.Zero, "SAVING");
        Assert.That((vm.Vm.RunState.State, io.OpenSessions), Is.EqualTo((state0, 0)));
        (io.FailAt, io.Step) = (-1, null);
        if (region is not null) region.Reading = null;
        events.Clear();
        Save(vm, "good");
        Assert.That(events, Is.EqualTo((MigrationEvent[])[MigrationEvent.PrecopySetup, MigrationEvent.PrecopyDone]));
        io.State = [];
        vm.Vm.Snapshots().Load("good", null, CancellationToken.None);
        byte[] loaded = region is null ? io.State : [.. region.Committed.SelectMany(static c => c)];
        Assert.That(loaded, Is.EqualTo(state), "the whole state, not the rest of it");
    }

    [Test]
    public void ADeviceThatFailsToStopFailsTheSnapshotAndTheGuestGoesOn([Values] bool load, [Values("reset", "broken", "lost")] string end)
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = [1, 2, 3] });
        vm.Vm.Cont();
        Save(vm, "good");
        int loads = device.Config.Trace.Count(static t => t == "LoadConfig");
        device.Io.Refuse[VfioDeviceState.Stop] = Errno.EIO;
        if (end == "broken") device.Io.ResetAnswer = Errno.EIO;
        if (end == "lost") device.Io.Lose(new DeviceStateException("its server died"));
        VmmException e = Assert.Catch<VmmException>(() =>
        {
            if (load) vm.Vm.Snapshots().Load("good", null, CancellationToken.None);
            else Save(vm, "bad");
        })!;
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(end == "broken" ? RunState.Paused : RunState.Running), VmmException.Describe(e));
        if (end == "broken") Assert.That(e.Message, Does.Contain("is paused"));
        if (end == "lost") Assert.That(VmmException.Describe(e), Does.Contain("gone"));
        Assert.That(device.Config.Trace.Count(static t => t == "LoadConfig"), Is.EqualTo(loads), "nothing was loaded");
        Assert.That(vm.Vm.Snapshots().List().Select(static s => s.Name), Is.EqualTo((string[])["good"]));
        if (end != "broken") return;
        device.Io.ResetAnswer = Errno.None;
        vm.Vm.Reset();
        vm.Vm.Cont();
        Save(vm, "later");
    }

    [Test]
    public void AGuestThatCannotStartAfterASnapshotIsPausedAndTheSnapshotStays([Values] bool load)
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = [1, 2, 3] });
        vm.Vm.Cont();
        Save(vm, "first");
        device.Io.State = [9];
        int resets = device.Io.Resets;
        device.Io.Refuse[VfioDeviceState.Running] = Errno.EBUSY;
        Assert.That(
            () => { if (load) vm.Vm.Snapshots().Load("first", null, CancellationToken.None); else Save(vm, "second"); },
            Throws.TypeOf<DeviceStateException>().With.Message.Contains(load ? "'first' is loaded, but the VM could not be started" : "'second' is saved, but the VM could not be started"));
        Assert.That((vm.Vm.RunState.State, device.State), Is.EqualTo((RunState.Paused, VfioDeviceState.Stop)));
        Assert.That(vm.Vm.Snapshots().List(), Has.Count.EqualTo(load ? 1 : 2));
        vm.Vm.Cont();
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(device.Io.State, Is.EqualTo(load ? (byte[])[1, 2, 3] : [9]), "a device that refuses to start keeps its state");
        Assert.That(device.Io.Resets, Is.EqualTo(resets + (load ? 1 : 0)), "only the reset before the load");
    }

    [Test]
    public async Task ADestinationsDeviceThatRefusesToStartKeepsTheStateThatArrived()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = [1, 2, 3] }, _ => new FakeVfioDevice("b", All));
        pair.To.Io.Accept = _ =>
        {
            pair.To.Io.Refuse[VfioDeviceState.RunningP2P] = Errno.EBUSY;
            return Errno.None;
        };
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That((source, pair.Destination.Vm.RunState.State, pair.To.State), Is.EqualTo((MigrationStatus.Completed, RunState.Paused, VfioDeviceState.Stop)));
        pair.Destination.Vm.Cont();
        Assert.That((pair.To.State, pair.To.Io.State), Is.EqualTo((VfioDeviceState.Running, (byte[])[1, 2, 3])));
    }

    [Test]
    public void AStartThatFailsStopsTheDevicesThatHadBegun()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci first = VfioPair.Add(vm, 0, new FakeVfioDevice("a", All)), second = VfioPair.Add(vm, 1, new FakeVfioDevice("b", All));
        vm.Vm.Cont();
        vm.Vm.Stop();
        second.Io.Refuse[VfioDeviceState.RunningP2P] = Errno.EBUSY;
        Assert.That(vm.Vm.Cont, Throws.TypeOf<DeviceStateException>().With.Message.Contains("'vfio1'"));
        Assert.That((first.State, first.Io.MigrationState, second.State), Is.EqualTo((VfioDeviceState.Stop, VfioDeviceState.Stop, VfioDeviceState.Stop)), "a paused VM's devices do no DMA");
        vm.Vm.Cont();
        Assert.That((first.State, second.State), Is.EqualTo((VfioDeviceState.Running, VfioDeviceState.Running)));
    }

    [TestCase(VfioDeviceState.Stop, VfioDeviceState.Stop)]
    [TestCase(VfioDeviceState.Running, VfioDeviceState.Running)]
    [TestCase(VfioDeviceState.StopCopy, VfioDeviceState.Stop)]
    [TestCase(VfioDeviceState.PreCopy, VfioDeviceState.Stop)]
    [TestCase(VfioDeviceState.Resuming, VfioDeviceState.Error)]
    public void AResetThatFailsIsNoSuccess(VfioDeviceState found, VfioDeviceState expected)
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", All) { ResetAnswer = Errno.EIO });
        if (found != VfioDeviceState.Running)
            using (vm.Vm.Bql.Acquire()) device.Migration.Protocol!.SetState(found, VfioDeviceState.Error);
        vm.Vm.Reset();
        Assert.That((device.State, device.Io.OpenSessions), Is.EqualTo((expected, 0)));
        if (expected != VfioDeviceState.Error) Assert.That(device.Io.MigrationState, Is.EqualTo(expected), "the state in the books is the device's");
        device.Io.ResetAnswer = Errno.None;
        vm.Vm.Reset();
        vm.Vm.Cont();
        Assert.That((device.State, device.Io.MigrationState), Is.EqualTo((VfioDeviceState.Running, VfioDeviceState.Running)));
    }

    [TestCase(1u, 1u)]
    [TestCase(0u, 0u)]
    [TestCase(2u, 0u)]
    [TestCase(4u, null)]
    public void AResetThatFailsIsNoSuccessForAV1DeviceEither(uint found, uint? expected)
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        using var region = new FakeV1Region(4096) { State = found };
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a") { V1 = region, ResetAnswer = Errno.EIO });
        vm.Vm.Reset();
        Assert.That(device.State, Is.EqualTo(expected switch { 1 => VfioDeviceState.Running, 0 => VfioDeviceState.Stop, _ => VfioDeviceState.Error }));
        if (expected is { } bits) Assert.That(region.State, Is.EqualTo(bits));
        else Assert.That(vm.Vm.Cont, Throws.TypeOf<DeviceStateException>().With.Message.Contains("broken"));
    }

    [Test]
    public void AStreamWithoutADevicesStateIsRefusedBeforeAnythingHasChanged()
    {
        using var folder = new TempDirectory();
        using (TestVm without = WithStore(folder)) Save(without, "s");
        using TestVm vm = WithStore(folder);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", All) { State = [7] });
        vm.FilledRandom(5);
        vm.Vm.Cont();
        byte[] page = vm.Ram.ReadOnlySlice(0, 4096).ToArray();
        Assert.That(() => vm.Vm.Snapshots().Load("s", null, CancellationToken.None), Throws.TypeOf<IncompatibleStateException>().With.Message.Contains("'vfio0': its state never came"));
        Assert.That((vm.Vm.RunState.State, device.State, device.Io.State), Is.EqualTo((RunState.Running, VfioDeviceState.Running, (byte[])[7])));
        Assert.That(vm.Ram.ReadOnlySlice(0, 4096).ToArray(), Is.EqualTo(page));
    }

    [Test]
    public async Task ADestinationWithADeviceThatTheSourceLacksRefusesTheVm()
    {
        using TestVm source = VfioPair.Host(64 << 10, incoming: false), destination = VfioPair.Host(64 << 10, incoming: true);
        VfioPair.Add(destination, 0, new FakeVfioDevice("b", All));
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        source.Vm.Cont();
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(b);
        Assert.That(await source.Engine.Migrate(a).WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(source.Engine.Query().Error!.ToString(), Does.Contain("its state never came"));
        Assert.That((source.Vm.RunState.State, destination.Vm.RunState.State), Is.EqualTo((RunState.Running, RunState.InMigrate)));
    }

    [Test]
    public void ALoadEndsTheNeedForAReset()
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder);
        vm.Vm.Cont();
        Save(vm, "s");
        using (vm.Vm.Bql.Acquire()) vm.Vm.RunState.Stop(RunState.Shutdown);
        vm.Vm.Snapshots().Load("s", null, CancellationToken.None);
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused));
        vm.Vm.Cont();
    }

    private static VfioPair Pair(Kind kind)
    {
        VfioMigrationFlags flags = kind == Kind.V2 ? All : VfioMigrationFlags.StopCopy;
        return new VfioPair(
            _ => new FakeVfioDevice("source-device", flags) { State = [1, 2, 3], V1 = kind == Kind.V1 ? new FakeV1Region(4096) { Data = [1, 2, 3] } : null },
            _ => new FakeVfioDevice("destination-device", flags) { V1 = kind == Kind.V1 ? new FakeV1Region(4096) : null },
            ramBytes: 1 << 20);
    }

    /// <summary>Migrates until the source waits in pre-switchover.</summary>
    /// <returns>How both sides end.</returns>
    private static async Task<Task<(MigrationStatus, MigrationStatus)>> ToPreSwitchover(VfioPair pair)
    {
        var reached = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        pair.Source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        pair.Source.Engine.StatusChanged += s => { if (s == MigrationStatus.PreSwitchover) reached.TrySetResult(); };
        Task<(MigrationStatus, MigrationStatus)> moving = pair.Migrate();
        await reached.Task.WaitAsync(VfioPair.Deadline);
        return moving;
    }

    private static SnapshotManifest Save(TestVm vm, string name) => vm.Vm.Snapshots().Save(name, overwrite: false, null, CancellationToken.None);

    private static TestVm WithStore(TempDirectory folder, ulong ram = 64 << 10) => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = ram }] },
        b =>
        {
            b.AddPlugin<VfioPlugin>();
            b.Services.AddSingleton(new SnapshotOptions { Directory = folder["store"] });
        });
}
