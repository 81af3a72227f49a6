using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>Capability switchover-ack: the source waits until the destination has loaded the first data (vfio-migration 3.6).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioSwitchoverAckTests
{
    private const VfioMigrationFlags All = VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy;

    [Test]
    public async Task TheVmIsNotStoppedBeforeTheFirstDataAreLoaded([Values] bool legacy, [Values(1, 2)] int devices)
    {
        using VfioPair pair = Pair(devices, legacy);
        const int parts = 3;
        using var idle = new CountdownEvent(devices);
        using var load = new ManualResetEventSlim();
        foreach (FakeVfioPci device in pair.SourceDevices)
        {
            int given = 0;
            device.Io.State = [1];
            // By this call the data have long been sent and the bandwidth window is over, so only the missing acknowledgement holds the switchover up.
            device.Io.EndlessPrecopy = () =>
            {
                if (given++ == parts + 60) idle.Signal();
                return given <= parts ? new byte[100] : [];
            };
            device.Io.PrecopyInfo = () => new VfioPrecopyInfo((ulong)Math.Max(0, parts - given) * 100, 0);
        }
        pair.DestinationDevices[^1].Io.WriteState = _ => load.Wait(VfioPair.Deadline);
        Task migration = pair.MigrateWell();
        Assert.That(idle.Wait(VfioPair.Deadline));
        Assert.That((pair.Source.Engine.Status, pair.Source.Vm.RunState.IsRunning), Is.EqualTo((MigrationStatus.Active, true)));
        load.Set();
        await migration;
    }

    [Test]
    public async Task WithoutADeviceThatWantsOneNothingIsWaitedFor([Values] bool legacy)
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = [1] }, _ => new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        Enable(pair, legacy);
        await pair.MigrateWell();
    }

    [Test]
    public async Task AFirstPartThatComesBackIsAcknowledgedAgain()
    {
        using VfioPair pair = Pair(1, legacy: false);
        FakeVfioDevice device = pair.From.Io;
        device.State = [1];
        int asked = 0;
        device.EndlessPrecopy = () => asked++ < 6 ? new byte[100] : [];
        bool reinit = false;
        device.PrecopyInfo = () =>
        {
            if (asked < 2) return new VfioPrecopyInfo((ulong)(2 - asked) * 100, 0);
            if (asked >= 3 && !reinit)
            {
                reinit = true;
                return new VfioPrecopyInfo(200, 0, IsReinit: true);
            }
            return new VfioPrecopyInfo(0, asked < 6 ? 1UL << 60 : 0);
        };
        await pair.MigrateWell();
        Assert.That(reinit);
    }

    [Test]
    public async Task AFirstPartAfterTheDecisionFailsTheMigrationAndTheVmGoesOn()
    {
        using VfioPair pair = Pair(1, legacy: false);
        FakeVfioDevice device = pair.From.Io;
        device.State = [1];
        int asked = 0;
        device.EndlessPrecopy = () => asked++ < 1 ? new byte[100] : [];
        bool late = false;
        device.PrecopyInfo = () => late ? new VfioPrecopyInfo(100, 0, IsReinit: true) : new VfioPrecopyInfo(asked == 0 ? 100UL : 0, 0);
        // The VM stops before the prepare pass, whose query is the first one to find new first data.
        using (pair.Source.Vm.Bql.Acquire()) pair.Source.Vm.RunState.Register(new First(() => late = true), priority: 100);
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("new first data after the switchover was decided"));
        pair.AssertOneSideRuns(atSource: true);
    }

    [Test]
    public void ItNeedsTheReturnPath()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        ConfigurationException e = Assert.Throws<ConfigurationException>(() => vm.Engine.SetCapabilities([new(MigrationCapability.SwitchoverAck, true)]))!;
        Assert.That(e.Message, Is.EqualTo("Capability 'switchover-ack' requires capability 'return-path'"));
    }

    private static VfioPair Pair(int devices, bool legacy)
    {
        var pair = new VfioPair(i => new FakeVfioDevice($"s{i}", All) { HasPrecopyInfoV2 = true }, i => new FakeVfioDevice($"d{i}", All), devices);
        Enable(pair, legacy);
        return pair;
    }

    private static void Enable(VfioPair pair, bool legacy)
    {
        foreach (TestVm vm in (TestVm[])[pair.Source, pair.Destination])
        {
            vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.SwitchoverAck, true)]);
            vm.FullEngine.Compat = vm.FullEngine.Compat with { LegacySwitchoverAck = legacy };
        }
    }

    private sealed class First(Action before) : Vmm.Core.RunStates.IVmStateHandler
    {
        public void OnVmStatePrepare(bool running, Vmm.Core.RunStates.RunState state)
        {
            if (!running) before();
        }

        public void OnVmStateChange(bool running, Vmm.Core.RunStates.RunState state)
        {
        }
    }
}
