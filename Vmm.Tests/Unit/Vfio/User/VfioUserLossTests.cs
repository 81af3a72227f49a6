using System.Diagnostics;
using System.Text.Json.Nodes;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Migration;
using Vmm.Migration.Qmp;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>Servers that go, freeze or come back, seen from the VM: an event, a state of the device, and never a reason why the VM cannot run.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class VfioUserLossTests : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);
    private readonly TempDirectory _folder = new();

    private string Socket => _folder["device"];

    public void Dispose() => _folder.Dispose();

    private TestVm Vm(string options = "", bool incoming = false) => new(
        new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }], IsIncoming = incoming,
            Devices = [DeviceOptions.Parse($"vfio-user-pci,id=dev,socket={Socket}{options}")],
        },
        b =>
        {
            b.AddPlugin<VfioPlugin>();
            b.Services.AddSingleton(new SnapshotOptions { Directory = _folder["snapshots"] });
        });

    private static VfioPciDevice Device(TestVm vm) => vm.Vm.Devices.OfType<VfioPciDevice>().Single();

    /// <summary>A server that migrates: it knows the features that a move without data needs.</summary>
    private static ScriptedVfioUserServer Migratable(OwnedFd socket)
    {
        var server = new ScriptedVfioUserServer(socket: socket) { HasMigration = true };
        VfioDeviceState state = VfioDeviceState.Running;
        server.KnowsFeatures(VfioDeviceFeature.Migration, VfioDeviceFeature.MigDeviceState, VfioDeviceFeature.DmaLoggingStart, VfioDeviceFeature.DmaLoggingStop, VfioDeviceFeature.DmaLoggingReport);
        server.OnFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. BitConverter.GetBytes((ulong)(VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy))]));
        server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. BitConverter.GetBytes((ulong)state)]));
        server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m =>
        {
            state = (VfioDeviceState)m.Body[8];
            server.Reply(m, m.Body);
        });
        server.OnFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. new byte[BitConverter.ToInt32(m.Body, 0) - m.Body.Length]]));
        server.On(VfioUserCommand.MigDataRead, m => server.Reply(m, [8, 0, 0, 0, 0, 0, 0, 0]));
        return server;
    }

    private static void Asked(ScriptedVfioUserServer server, bool forFeatures) =>
        Assert.That(server.Received.Exists(static m => m.Command == VfioUserCommand.DeviceFeature), Is.EqualTo(forFeatures), "DEVICE_FEATURE");

    [Test]
    public void AServerThatEndsTheConnectionAtDeviceFeatureIsUsedWithoutIt()
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, _) =>
        {
            var server = new ScriptedVfioUserServer(socket: socket);
            return server.On(VfioUserCommand.DeviceFeature, _ => server.Hangup()).On(VfioUserCommand.RegionRead, m => server.Reply(m, [.. m.Body, .. Enumerable.Repeat((byte)0x5a, (int)m.Access.Count)]));
        });
        using TestVm vm = Vm();
        Assert.That(Device(vm).IsLost, Is.False);
        vm.Vm.Cont();
        vm.Vm.Stop();
        vm.Vm.Reset();
        Assert.That(Device(vm).Function.Read(0, 0, 4), Is.EqualTo(0x5a5a5a5a), "the device works");
        Assert.That(vm.Engine.Query().BlockedReasons, Is.EqualTo((string[])[$"device 'dev' ({Socket}): its server ends the connection when it is asked how the device migrates (DEVICE_FEATURE)"]));
        Assert.That(listener.Servers, Has.Count.EqualTo(2));
        Asked(listener.Servers[1], forFeatures: false);
    }

    [Test]
    public void AServerThatCanBeUsedOnlyOnceStopsTheStartWithAHint()
    {
        ScriptedVfioUserListener? listener = null;
        listener = new ScriptedVfioUserListener(Socket, (socket, i) =>
        {
            var server = new ScriptedVfioUserServer(socket: socket);
            if (i > 0) return server.On(VfioUserCommand.Version, _ => server.Hangup());
            return server.On(VfioUserCommand.DeviceFeature, _ => server.Hangup());
        });
        using (listener)
        {
            VfioException refusal = Assert.Throws<VfioException>(() => Vm(",x-msg-timeout=500"))!;
            Assert.That((refusal.Message, refusal.Hint), Is.EqualTo((refusal.Message, "enable-migration=off uses the device without this command")));
            Assert.That(refusal.Message, Does.Contain("DEVICE_FEATURE").And.Contain(Socket));
        }
    }

    [Test]
    public void AServerOfMinor0OrWithMigrationOffIsNotAsked([Values] bool isOff)
    {
        using var listener = new ScriptedVfioUserListener(Socket, (socket, _) =>
        {
            var server = new ScriptedVfioUserServer(socket: socket);
            server.On(VfioUserCommand.DeviceFeature, _ => server.Hangup());
            if (!isOff) server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion { Minor = 0, MaxMsgFds = 8 }.ToPayload()));
            return server;
        });
        using TestVm vm = Vm(isOff ? ",enable-migration=off" : "");
        vm.Vm.Cont();
        vm.Vm.Reset();
        Assert.That((Device(vm).IsLost, listener.Servers.Count), Is.EqualTo((false, 1)));
        Asked(listener.Servers[0], forFeatures: false);
        Assert.That(vm.Engine.Query().BlockedReasons, Has.Count.EqualTo(1));
    }

    [Test]
    public void AServerThatDiesWhileTheDeviceIsOpenedStopsTheStart([Values(VfioUserCommand.DeviceGetIrqInfo, VfioUserCommand.RegionRead, VfioUserCommand.DeviceSetIrqs)] VfioUserCommand last)
    {
        using var listener = new ScriptedVfioUserListener(Socket, (socket, _) =>
        {
            var server = new ScriptedVfioUserServer(socket: socket);
            return server.On(last, _ => server.Hangup());
        });
        Assert.That(() => Vm(",x-msg-timeout=500"), Throws.InstanceOf<VmmException>());
    }

    [Test]
    public void ALostDeviceIsAnEventAStateAndABlockerAndTheVmRunsOn()
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, _) => Migratable(socket));
        using TestVm vm = Vm();
        var lost = new TaskCompletionSource<(string Id, VmmException Reason)>(TaskCreationOptions.RunContinuationsAsynchronously);
        vm.Vm.Events.Lost += (id, reason) => lost.TrySetResult((id, reason));
        vm.Vm.Cont();
        Assert.That((Device(vm).LostReason, vm.Engine.Query().BlockedReasons.Count), Is.EqualTo(((string?)null, 0)));
        listener.Servers[0].Hangup();
        Assert.That(lost.Task.Wait(s_deadline));
        Assert.That((lost.Task.Result.Id, lost.Task.Result.Reason.Errno), Is.EqualTo(("dev", Errno.ECONNRESET)));
        Assert.That(((IVmDevice)Device(vm)).LostReason, Does.Contain("the server ended the connection"));
        LeakCheck.WaitFor(() => vm.Engine.Query().BlockedReasons.Count == 1, "no blocker");
        Assert.That(() => vm.Engine.Migrate(InMemoryChannel.CreatePair().Item1), Throws.TypeOf<MigrationBlockedException>().With.Message.Contains($"device 'dev' ({Socket}) is gone"));
        var clock = Stopwatch.StartNew();
        for (int i = 0; i < 3; i++)
        {
            vm.Vm.Stop();
            Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused));
            vm.Vm.Cont();
            Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        }
        Assert.That(Device(vm).Function.Read(0, 0, 4), Is.EqualTo(0xffffffff));
        Assert.That(clock.Elapsed, Is.LessThan(s_deadline));
    }

    [Test]
    public void SnapshotsOfAVmWithALostDeviceAreRefusedBeforeAnythingIsTouched()
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, _) => Migratable(socket));
        using TestVm vm = Vm();
        vm.FilledRandom(1);
        vm.Vm.Cont();
        vm.Vm.Snapshots().Save("before", overwrite: false, null, CancellationToken.None);
        listener.Servers[0].Hangup();
        LeakCheck.WaitFor(() => vm.Engine.Query().BlockedReasons.Count == 1, "the loss was not noticed");
        vm.FilledRandom(2);
        byte[] ram = vm.Ram.Slice(0, 1 << 20).ToArray();
        Assert.That(() => vm.Vm.Snapshots().Save("after", overwrite: false, null, CancellationToken.None), Throws.TypeOf<MigrationBlockedException>());
        Assert.That(() => vm.Vm.Snapshots().Load("before", null, CancellationToken.None), Throws.InstanceOf<VmmException>().With.Message.Match("device 'dev'.* is gone"));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(vm.Ram.Slice(0, 1 << 20).SequenceEqual(ram), "RAM is as it was");
        // With a server there is somebody to take the state.
        vm.Vm.Reset();
        vm.Vm.Snapshots().Load("before", null, CancellationToken.None);
        Assert.That((vm.Vm.RunState.State, vm.Ram.Slice(0, 1 << 20).SequenceEqual(ram)), Is.EqualTo((RunState.Running, false)));
    }

    [Test]
    public void AFrozenServerIsWaitedForOnceAndThenLost()
    {
        using var release = new ManualResetEventSlim();
        using var listener = new ScriptedVfioUserListener(Socket, (socket, _) =>
        {
            ScriptedVfioUserServer server = Migratable(socket);
            return server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m => release.Wait());
        });
        try
        {
            using TestVm vm = Vm(",x-msg-timeout=300,x-mig-timeout=60000");
            // The first start finds the device in RUNNING already.
            vm.Vm.Cont();
            var clock = Stopwatch.StartNew();
            vm.Vm.Stop();
            Assert.That(clock.ElapsedMilliseconds, Is.InRange(250, 10_000), "a stop moves no data, so it has the limit of a request");
            Assert.That((vm.Vm.RunState.State, Device(vm).Io.LostReason!.Errno), Is.EqualTo((RunState.Paused, Errno.ETIMEDOUT)));
            clock.Restart();
            vm.Vm.Cont();
            vm.Vm.Stop();
            vm.Vm.Cont();
            Assert.That((vm.Vm.RunState.State, clock.ElapsedMilliseconds < 10_000), Is.EqualTo((RunState.Running, true)));
        }
        finally
        {
            release.Set();
        }
    }

    [Test]
    public void AMigrationFailsAtOnceWhenTheServerGoes([Values] bool isFrozen)
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, _) => Migratable(socket));
        using TestVm vm = Vm(isFrozen ? ",x-msg-timeout=300" : "");
        vm.FilledRandom(1);
        vm.Engine.Parameters = vm.Engine.Parameters with { MaxBandwidthBytesPerSecond = 4096, DowntimeLimitMs = 1 };
        vm.Vm.Cont();
        // At this bandwidth the first pass takes minutes.
        (InMemoryChannel ours, InMemoryChannel theirs) = InMemoryChannel.CreatePair();
        using (theirs)
        {
            Task<MigrationStatus> migration = vm.Engine.Migrate(ours);
            LeakCheck.WaitFor(() => vm.Engine.Status == MigrationStatus.Active, "not active");
            Assert.That(migration.IsCompleted, Is.False);
            if (isFrozen)
            {
                listener.Servers[0].On(VfioUserCommand.RegionRead, static _ => { });
                Device(vm).Function.Read(0, 0, 4);
            }
            else
            {
                listener.Servers[0].Hangup();
            }
            Assert.That(migration.Wait(s_deadline), "the migration is still active");
            Assert.That((migration.Result, vm.Vm.RunState.State), Is.EqualTo((MigrationStatus.Failed, RunState.Running)));
            Assert.That(vm.Engine.Query().Error!.ToString(), Does.Match("device 'dev'.* is gone"));
        }
    }

    [Test]
    public void AResetAttachesALostDeviceToANewServer()
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, i) =>
        {
            ScriptedVfioUserServer server = Migratable(socket);
            return server.On(VfioUserCommand.RegionRead, m => server.Reply(m, [.. m.Body, .. Enumerable.Repeat((byte)(m.Access.Region == 0 ? i + 1 : 0), (int)m.Access.Count)]));
        });
        using TestVm vm = Vm();
        var returned = new List<string>();
        vm.Vm.Events.Returned += returned.Add;
        vm.Vm.Cont();
        Assert.That(Device(vm).Function.Read(0, 0, 4), Is.EqualTo(0x01010101));
        for (int round = 1; round <= 3; round++)
        {
            listener.Servers[^1].Hangup();
            LeakCheck.WaitFor(() => vm.Engine.Query().BlockedReasons.Count == 1, "the loss was not noticed");
            vm.Vm.Reset();
            Assert.That(returned, Is.EqualTo(Enumerable.Repeat("dev", round)));
            Assert.That((Device(vm).IsLost, ((IVmDevice)Device(vm)).LostReason), Is.EqualTo((false, (string?)null)));
            Assert.That((vm.Vm.RunState.State, vm.Engine.Query().BlockedReasons.Count), Is.EqualTo((RunState.Running, 0)));
            Assert.That(Device(vm).Function.Read(0, 0, 4), Is.EqualTo(0x01010101u * (uint)(round + 1)));
            ScriptedVfioUserServer server = listener.Servers[^1];
            Assert.That(server.Received.Count(static m => m.Command == VfioUserCommand.DmaMap), Is.EqualTo(1), "it has the guest's memory");
            Assert.That(server.Received.Exists(static m => m.Command == VfioUserCommand.DeviceSetIrqs && m.Fds.Count == 1), "and its interrupts");
            Assert.That(server.Received.Exists(static m => m.Command == VfioUserCommand.DeviceReset));
        }
        vm.Engine.Parameters = vm.Engine.Parameters with { DowntimeLimitMs = 2_000_000 };
        using var stream = new MemoryStreamChannel();
        Assert.That(vm.Engine.Migrate(stream).WaitAsync(s_deadline).Result, Is.EqualTo(MigrationStatus.Completed), "and it migrates again");
    }

    [Test]
    public void AResetWithoutAServerOrWithAnotherDeviceLeavesTheDeviceLost([Values] bool isOther)
    {
        ScriptedVfioUserListener? listener = new(Socket, (socket, i) =>
        {
            ScriptedVfioUserServer server = Migratable(socket);
            if (i > 0) server.Irqs = 4;
            return server;
        });
        try
        {
            using TestVm vm = Vm();
            vm.Vm.Cont();
            listener.Servers[0].Hangup();
            LeakCheck.WaitFor(() => vm.Engine.Query().BlockedReasons.Count == 1, "the loss was not noticed");
            if (!isOther)
            {
                listener.Dispose();
                listener = null;
            }
            vm.Vm.Reset();
            Assert.That((vm.Vm.RunState.State, Device(vm).IsLost), Is.EqualTo((RunState.Running, true)), "the VM runs on without it");
            Assert.That(vm.Engine.Query().BlockedReasons, Has.Count.EqualTo(1));
        }
        finally
        {
            listener?.Dispose();
        }
    }

    [Test]
    public void TheMonitorTellsOfALostDevice()
    {
        using var listener = new ScriptedVfioUserListener(Socket, static (socket, _) => Migratable(socket));
        using TestVm vm = Vm();
        using var server = new QmpServer(vm.Vm, vm.Engine);
        server.Listen(_folder["qmp"]);
        using var client = QmpClient.Connect(_folder["qmp"], s_deadline);
        const string prefix = QmpServer.ExtensionPrefix;
        JsonNode Devices() => client.Execute(prefix + "query-devices")!;
        Assert.That(Devices().ToJsonString(), Is.EqualTo("""[{"id":"dev","state":"present"}]"""));
        using var limit = new CancellationTokenSource(s_deadline);
        Task<JsonObject?> told = Task.Run(async () =>
        {
            await foreach (QmpEvent one in client.Events(limit.Token))
                if (one.Name == prefix + "DEVICE_LOST") return (JsonObject?)one.Data;
            return null;
        });
        listener.Servers[0].Hangup();
        Assert.That(told.Wait(s_deadline));
        Assert.That((string)told.Result!["id"]!, Is.EqualTo("dev"));
        Assert.That((string)told.Result!["reason"]!, Does.Contain("the server ended the connection"));
        JsonNode now = Devices()[0]!;
        Assert.That(((string)now["state"]!, now["reason"]!.ToString()), Is.EqualTo(("lost", told.Result["reason"]!.ToString())));
    }
}
