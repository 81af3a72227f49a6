using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Property;

/// <summary>SetState on the fake device: all 8x8 pairs of states, with and without a recovery state, and random walks.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioStatePairsTests
{
    [Test]
    public void EveryPairEndsWhereTheRulesSay([ValueSource(nameof(FlagSets))] int flagSet, [Values] bool recover)
    {
        var flags = (VfioMigrationFlags)flagSet;
        int pairs = 0, reached = 0, refused = 0;
        foreach (VfioDeviceState from in VfioStateArcs.States)
        {
            foreach (VfioDeviceState to in VfioStateArcs.States)
            {
                pairs++;
                var config = new FakeConfigState();
                var device = new FakeVfioDevice("d", flags) { State = [1, 2, 3] };
                using var protocol = new VfioMigrationV2(device, config, flags, precopyInfoV2: false, new DeviceTransferCounter());
                if (!Drive(protocol, device, from)) continue;
                int resets = device.Resets;
                IReadOnlyList<VfioDeviceState>? path = VfioStateArcs.Path(from, to, flags);
                VfioDeviceState recoverTo = recover ? from : VfioDeviceState.Error;
                string pair = $"{from} to {to} ({flags})";
                if (path is not null || from == to)
                {
                    protocol.SetState(to, recoverTo);
                    Assert.That((protocol.State, device.MigrationState == protocol.State || from == VfioDeviceState.Error), Is.EqualTo((to, true)), pair);
                    Assert.That(device.Resets, Is.EqualTo(resets), pair);
                    reached++;
                }
                else
                {
                    VfioException e = Assert.Throws<VfioException>(() => protocol.SetState(to, recoverTo), pair)!;
                    Assert.That(e.Errno, Is.EqualTo(from == VfioDeviceState.Error ? Errno.EIO : Errno.EINVAL), pair);
                    VfioDeviceState end = from == VfioDeviceState.Error ? VfioDeviceState.Error : recover ? from : VfioDeviceState.Running;
                    Assert.That(protocol.State, Is.EqualTo(end), pair);
                    Assert.That((device.Resets - resets, config.Reapplied), Is.EqualTo(end == VfioDeviceState.Running && !recover ? (1, 1) : (0, 0)), pair);
                    refused++;
                }
                Assert.That(device.OpenSessions, Is.EqualTo(VfioStateArcs.HasData(protocol.State) ? 1 : 0), $"{pair}: a session is open exactly in the states that have data");
            }
        }
        Assert.That(pairs, Is.EqualTo(64));
        TestContext.Out.WriteLine($"{flags}: {reached} reached, {refused} refused, {pairs - reached - refused} from states the device lacks");
    }

    [Test]
    public void ARandomWalkNeverLeavesCacheAndDeviceApart([Range(1, 20)] int seed)
    {
        var random = new Random(seed);
        VfioMigrationFlags flags = VfioStateArcs.FlagSets[random.Next(4)];
        var device = new FakeVfioDevice("d", flags) { State = [1, 2, 3] };
        using var protocol = new VfioMigrationV2(device, new FakeConfigState(), flags, precopyInfoV2: false, new DeviceTransferCounter());
        for (int i = 0; i < 500; i++)
        {
            VfioDeviceState to = VfioStateArcs.States[random.Next(1, 8)];
            if (random.Next(4) == 0) device.Refuse[VfioStateArcs.States[random.Next(1, 8)]] = Errno.EIO;
            try
            {
                protocol.SetState(to, random.Next(2) == 0 ? protocol.State : VfioDeviceState.Error);
            }
            catch (VfioException)
            {
                // The device refuses some steps on purpose. The asserts below check the state that remains.
            }
            Assert.That(protocol.State, Is.EqualTo(device.MigrationState), $"seed {seed}, step {i}");
            Assert.That(device.OpenSessions, Is.EqualTo(VfioStateArcs.HasData(protocol.State) ? 1 : 0), $"seed {seed}, step {i}");
        }
    }

    private static bool Drive(VfioMigrationV2 protocol, FakeVfioDevice device, VfioDeviceState to)
    {
        if (to != VfioDeviceState.Error)
        {
            if (!VfioStateArcs.IsSupported(to, protocol.Flags)) return false;
            protocol.SetState(to, VfioDeviceState.Error);
            return true;
        }
        (device.FailAt, device.ResetAnswer) = (0, Errno.EIO);
        Assert.Throws<VfioException>(() => protocol.SetState(VfioDeviceState.Stop, VfioDeviceState.Error));
        return true;
    }

    private static IEnumerable<int> FlagSets() => VfioStateArcs.FlagSets.Select(static f => (int)f);
}
