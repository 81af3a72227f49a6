using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>The hand-over to a QEMU, which has no final word (STREAM.md): when its answer is lost, the VM may run there.</summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class HandOverQemuTests
{
    private const ulong Size = 4 << 20;

    [Test]
    public async Task ASourceWhoseQemuConfirmedUnheardIsHeld([ValueSource(typeof(QemuVersions), nameof(QemuVersions.All))] string version)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-incoming", "defer");
        int port = MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")).Port;
        using var relay = new TcpRelay(port, back: true, TcpRelay.Confirmation, RelayFault.Mute);
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(5);
        vm.Vm.Cont();
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        vm.Engine.Parameters = vm.Engine.Parameters with { ConfirmTimeoutMs = 300 };
        Assert.That(await vm.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{relay.Port}")).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{vm.Engine.Query().Error}", Does.Contain("has not confirmed within 0.3 s").And.Contain("may run there").And.Contain("cont --force"));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused));
        Assert.That(vm.Vm.Cont, Throws.TypeOf<DeviceStateException>(), "QEMU runs the VM");
        Assert.That(qemu.Run("query-status")!["running"]!.GetValue<bool>(), Is.True);
        Assert.That(() => vm.Engine.Migrate(new MemoryChannel()), Throws.InstanceOf<VmmException>(), "a held VM does not go elsewhere either");
        qemu.Kill();
        vm.Vm.Cont(force: true);
        Assert.That(vm.Vm.RunState.IsRunning);
    }

    /// <summary>A cancel behind the last byte only asks QEMU. The status says cancelling when the VM stays, and not when it has moved.</summary>
    [Test]
    public async Task ACancelThatComesTooLateChangesNoStatus()
    {
        using var qemu = new QemuProcess("11.1", Size, "m", "-incoming", "defer");
        using var relay = new TcpRelay(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")).Port, back: true, TcpRelay.Confirmation, RelayFault.Delay);
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(5);
        var statuses = new List<MigrationStatus>();
        vm.Engine.StatusChanged += statuses.Add;
        vm.Vm.Cont();
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{relay.Port}"));
        Assert.That(relay.Happened.Wait(QemuProcess.Deadline));
        vm.Engine.Cancel();
        relay.GoOn();
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(statuses, Is.EqualTo(new[] { MigrationStatus.Setup, MigrationStatus.Active, MigrationStatus.Device, MigrationStatus.Completed }));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
    }

    /// <summary>A QEMU that stands still takes the connection, and says nothing.</summary>
    [Test]
    public async Task AGuestIsNotStoppedForAFrozenQemu()
    {
        using var qemu = new QemuProcess("11.1", Size, "m", "-incoming", "defer");
        var address = MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"));
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(5);
        vm.Vm.Cont();
        var states = new List<RunState>();
        vm.Vm.RunState.Changed += (_, to) => states.Add(to);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        vm.Engine.Parameters = vm.Engine.Parameters with { SetupTimeoutMs = 500 };
        qemu.Signal("STOP");
        try
        {
            Assert.That(await vm.Engine.Migrate(address).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        }
        finally
        {
            qemu.Signal("CONT");
        }
        Assert.That($"{vm.Engine.Query().Error}", Does.Contain("has not answered for 0.5 s"));
        Assert.That(states, Is.Empty);
        Assert.That(vm.Vm.RunState.IsRunning);
    }
}
