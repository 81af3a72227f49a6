using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Property;

/// <summary>
/// Full migrations in which the Nth call to the device fails, for every N, on each side and with each protocol. Exactly one side runs
/// afterwards, and after a failure the next attempt succeeds with the same state.
/// </summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioFailureInjectionTests
{
    public enum Kind
    {
        V1,
        V2,
        V2WithoutPrecopy,
    }

    [Test]
    public async Task AFailureAtAnyCallLosesNoMachine([Values] Kind kind, [Values] bool atSource)
    {
        byte[] state = new byte[2500];
        new Random(9).NextBytes(state);
        int points;
        using (VfioPair whole = Pair(kind, state))
        {
            FakeVfioDevice watched = (atSource ? whole.From : whole.To).Io;
            int before = watched.Calls.Count;
            await whole.MigrateWell();
            points = watched.Calls.Count - before;
        }
        int completed = 0, failed = 0, paused = 0;
        for (int point = 0; point < points; point++)
        {
            using VfioPair pair = Pair(kind, state);
            FakeVfioDevice device = (atSource ? pair.From : pair.To).Io;
            int before = device.Calls.Count;
            device.FailAt = before + point;
            (MigrationStatus source, MigrationStatus destination) = await pair.Migrate();
            string what = $"{kind}, call {point} at the {(atSource ? "source" : "destination")}: {(device.Calls.Count > device.FailAt ? device.Calls[device.FailAt] : "not reached")}";
            Assert.That(source, Is.AnyOf(MigrationStatus.Completed, MigrationStatus.Failed), what);
            if (source == MigrationStatus.Completed)
            {
                completed++;
                Assert.That(destination, Is.EqualTo(MigrationStatus.Completed), what);
                if (pair.Destination.Engine.Query().Error is { } refused)
                {
                    paused++;
                    AssertPausedUntilCont(pair, state, refused, what);
                }
                AssertTheStateArrived(pair, state, what);
                continue;
            }
            failed++;
            Assert.That(destination, Is.EqualTo(MigrationStatus.Failed), what);
            Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain(device.Name), what);
            Assert.That((pair.Source.Vm.RunState.IsRunning, pair.Destination.Vm.RunState.IsRunning), Is.EqualTo((true, false)), what);
            pair.AssertOneSideRuns(atSource: true);
            Rewind(pair, state);
            await pair.MigrateWell();
            AssertTheStateArrived(pair, state, $"{what}, second attempt");
        }
        TestContext.Out.WriteLine(
            $"{kind}, failures at the {(atSource ? "source" : "destination")}: {points} points visited, {completed} survived, {paused} of them paused until cont, {failed} failed and retried");
        Assert.That(points, Is.GreaterThan(4));
        Assert.That(completed + failed, Is.EqualTo(points));
        Assert.That(paused, atSource ? Is.Zero : Is.Positive, "the destination's calls include those that start the device");
    }

    private static VfioPair Pair(Kind kind, byte[] state)
    {
        VfioMigrationFlags flags = kind == Kind.V2
            ? VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy
            : VfioMigrationFlags.StopCopy;
        var pair = new VfioPair(
            _ => new FakeVfioDevice("source-device", flags) { V1 = kind == Kind.V1 ? new FakeV1Region(4096) : null },
            _ => new FakeVfioDevice("destination-device", flags) { V1 = kind == Kind.V1 ? new FakeV1Region(512) : null });
        Rewind(pair, state);
        return pair;
    }

    private static void Rewind(VfioPair pair, byte[] state)
    {
        FakeVfioDevice device = pair.From.Io;
        device.FailAt = -1;
        pair.To.Io.FailAt = -1;
        if (device.V1 is { } v1)
        {
            (v1.Data, v1.ChunkBytes) = (state, 700);
            pair.To.Io.V1!.Committed.Clear();
            return;
        }
        device.Precopy.Clear();
        if ((device.Flags & VfioMigrationFlags.PreCopy) != 0) device.Precopy.Enqueue(state[..500]);
        device.State = (device.Flags & VfioMigrationFlags.PreCopy) != 0 ? state[500..] : state;
        (device.MaxTransfer, device.PrecopyInfo) = (900, () => new VfioPrecopyInfo((ulong)device.Precopy.Count * 500, 0));
    }

    private static void AssertTheStateArrived(VfioPair pair, byte[] state, string what)
    {
        Assert.That(Arrived(pair), Is.EqualTo(state), what);
        pair.AssertOneSideRuns(atSource: false);
    }

    /// <summary>
    /// The destination's last calls start the device, after the source has let go. If the device refuses, the VM has moved all the same: the
    /// migration is completed and says why the VM is paused, no side runs, and <c>cont</c> tries again.
    /// </summary>
    private static void AssertPausedUntilCont(VfioPair pair, byte[] state, MigrationError refused, string what)
    {
        Assert.That(refused.ToString(), Does.StartWith("destination, start: could not start the VM").And.Contain(pair.To.Io.Name), what);
        Assert.That((pair.Source.Vm.RunState.State, pair.Destination.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Paused)), what);
        Assert.That(Arrived(pair), Is.EqualTo(state), what);
        pair.Destination.Vm.Cont();
    }

    private static byte[] Arrived(VfioPair pair) => pair.To.Io.V1 is { } v1 ? [.. v1.Committed.SelectMany(static c => c)] : pair.To.Io.State;
}
