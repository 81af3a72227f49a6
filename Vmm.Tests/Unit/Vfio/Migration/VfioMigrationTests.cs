using NUnit.Framework;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>Whole migrations of VMs whose fake devices speak protocol v2.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioMigrationTests
{
    private const VfioMigrationFlags All = VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy;

    [Test]
    public async Task StateArrivesWithEveryFlagSet([ValueSource(nameof(FlagSets))] int flagSet, [Values(0, 1, 70_000, 3_000_000)] int bytes)
    {
        var flags = (VfioMigrationFlags)flagSet;
        byte[] state = Bytes(bytes, 1), precopy = Bytes(5000, 2);
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", flags) { State = state, MaxTransfer = 40_000 }, _ => new FakeVfioDevice("b", flags) { MaxTransfer = 33_333 });
        bool live = (flags & VfioMigrationFlags.PreCopy) != 0;
        if (live) pair.From.Io.Precopy.Enqueue(precopy);
        pair.From.Io.PrecopyInfo = () => new VfioPrecopyInfo(pair.From.Io.Precopy.Count > 0 ? 5000UL : 0, 0);
        await pair.MigrateWell();
        pair.AssertOneSideRuns(atSource: false);
        Assert.That(pair.To.Io.State, Is.EqualTo(live ? [.. precopy, .. state] : state));
        Assert.That(pair.From.State, Is.EqualTo(VfioDeviceState.Stop), "the source ends stopped");
        Assert.That(pair.Source.Engine.Query().VfioTransferredBytes, Is.EqualTo(bytes + (live ? 5000 : 0)));
        Assert.That(pair.To.Config.Trace, Has.Member("LoadConfig"));
    }

    [Test]
    public async Task AllDevicesCeaseP2PBeforeAnyStops()
    {
        var order = new List<string>();
        FakeVfioDevice Make(string side, int i) => new($"{side}{i}", All) { State = Bytes(100, i), Step = (d, s) => order.Add($"{d.Name}:{s.ToName()}") };
        using var pair = new VfioPair(i => Make("s", i), i => Make("d", i), devices: 3);
        order.Clear();
        await pair.MigrateWell();
        string[] source = [.. order.Where(static o => o[0] == 's')];
        int lastPrepare = Array.FindLastIndex(source, static o => o.EndsWith(":PRE_COPY_P2P", StringComparison.Ordinal));
        int firstStop = Array.FindIndex(source, static o => o.EndsWith(":STOP_COPY", StringComparison.Ordinal));
        Assert.That(lastPrepare, Is.GreaterThan(0).And.LessThan(firstStop), string.Join(' ', source));
        string[] started = [.. order.Where(static o => o[0] == 'd')];
        lastPrepare = Array.FindLastIndex(started, static o => o.EndsWith(":RUNNING_P2P", StringComparison.Ordinal));
        int firstRun = Array.FindLastIndex(started, static o => o == "d0:RUNNING");
        Assert.That(lastPrepare, Is.LessThan(firstRun), string.Join(' ', started));
        for (int i = 0; i < 3; i++) Assert.That(pair.DestinationDevices[i].Io.State, Is.EqualTo(Bytes(100, i)));
        pair.AssertOneSideRuns(atSource: false);
    }

    [Test]
    public async Task CancelledAndRetriedThreeTimesInARow()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = Bytes(9000, 3) }, _ => new FakeVfioDevice("b", All));
        for (int i = 0; i < 3; i++)
        {
            using var reached = new ManualResetEventSlim();
            pair.From.Io.EndlessPrecopy = () =>
            {
                reached.Set();
                return Bytes(1000, 4);
            };
            pair.From.Io.PrecopyInfo = static () => new VfioPrecopyInfo(1UL << 60, 1000);
            (Vmm.Core.Channels.InMemoryChannel a, Vmm.Core.Channels.InMemoryChannel b) = Vmm.Core.Channels.InMemoryChannel.CreatePair();
            Task<MigrationStatus> incoming = pair.Destination.Engine.MigrateIncoming(b);
            Task<MigrationStatus> outgoing = pair.Source.Engine.Migrate(a);
            Assert.That(reached.Wait(VfioPair.Deadline), "the device gives precopy data");
            pair.Source.Engine.Cancel();
            Assert.That(await outgoing.WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Cancelled));
            Assert.That(await incoming.WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed));
            pair.AssertOneSideRuns(atSource: true);
            Assert.That(pair.From.Io.Resets, Is.Zero, "a cancel needs no reset");
            Assert.That(pair.To.State, Is.EqualTo(VfioDeviceState.Running), "only a reset takes the destination's device out of RESUMING");
        }
        pair.From.Io.EndlessPrecopy = null;
        pair.From.Io.PrecopyInfo = static () => new VfioPrecopyInfo(0, 0);
        await pair.MigrateWell();
        Assert.That(pair.To.Io.State, Is.EqualTo(Bytes(9000, 3)));
    }

    [Test]
    public async Task ZeroAndENOMSGInPrecopyBothMeanNothingNow()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = Bytes(10, 5) }, _ => new FakeVfioDevice("b", All));
        int asked = 0;
        byte[]? Next() => ++asked switch { 1 => Bytes(7, 6), 2 => null, 3 => [], 4 => Bytes(9, 7), _ => [] };
        pair.From.Io.EndlessPrecopy = Next;
        pair.From.Io.PrecopyInfo = () => asked < 4 ? new VfioPrecopyInfo(1UL << 60, 0) : default(VfioPrecopyInfo);
        await pair.MigrateWell();
        Assert.That(pair.To.Io.State, Is.EqualTo((byte[])[.. Bytes(7, 6), .. Bytes(9, 7), .. Bytes(10, 5)]));
    }

    [Test]
    public async Task ADestinationThatDislikesItsDataFailsTheLoadWhileTheSourceCanGoOn()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = Bytes(50, 8) }, _ => new FakeVfioDevice("b", All) { Accept = static _ => Errno.EINVAL });
        (MigrationStatus source, MigrationStatus destination) = await pair.Migrate();
        Assert.That((source, destination), Is.EqualTo((MigrationStatus.Failed, MigrationStatus.Failed)));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("'b'").And.Contain("RESUMING to STOP").And.Contain("EINVAL"));
        pair.AssertOneSideRuns(atSource: true);
        pair.To.Io.Accept = static _ => Errno.None;
        await pair.MigrateWell();
        Assert.That(pair.To.Io.State, Is.EqualTo(Bytes(50, 8)));
    }

    [Test]
    public async Task ADeviceLeftInAnyStateIsResetWhenItIsOpened()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", All) { MigrationState = VfioDeviceState.PreCopy });
        Assert.That((device.Io.Resets, device.State), Is.EqualTo((1, VfioDeviceState.Running)));
        var stubborn = new FakeVfioDevice("c", All) { MigrationState = VfioDeviceState.Resuming, ResetAnswer = Errno.EINVAL };
        VfioException e = Assert.Throws<VfioException>(() => VfioPair.Add(vm, 1, stubborn));
        Assert.That(e.Message, Does.Contain("'c' was left in RESUMING"));
        await Task.CompletedTask;
    }

    [Test]
    public async Task TheDowntimeLimitHoldsForTheStateOfADevice([Values("known", "unknown", "stated")] string size)
    {
        var options = new VfioMigrationOptions { StopCopyBytes = size == "stated" ? 1000 : VfioMigrationOptions.UnknownStopCopyBytes };
        using var pair = new VfioPair(
            _ => new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = Bytes(1000, 3), DataSize = size == "known" ? 1UL << 30 : ulong.MaxValue },
            _ => new FakeVfioDevice("b", VfioMigrationFlags.StopCopy), options: options);
        pair.Source.Engine.Parameters = pair.Source.Engine.Parameters with { DowntimeLimitMs = 300 };
        int before = pair.From.Io.Count("MigDataSize");
        Task<(MigrationStatus Source, MigrationStatus)> moving = pair.Migrate();
        if (size != "stated")
        {
            // The engine asks for the exact size whenever nothing else is left; it has decided against the stop each of these times.
            LeakCheck.WaitFor(() => pair.From.Io.Count("MigDataSize") >= before + 20, "the source does not ask for the size");
            Assert.That((pair.Source.Engine.Status, pair.Source.Vm.RunState.IsRunning), Is.EqualTo((MigrationStatus.Active, true)));
            pair.Source.Engine.Parameters = pair.Source.Engine.Parameters with { DowntimeLimitMs = 2_000_000, AvailSwitchoverBandwidthBytesPerSecond = 1UL << 30 };
        }
        Assert.That((await moving.WaitAsync(VfioPair.Deadline)).Source, Is.EqualTo(MigrationStatus.Completed));
        Assert.That(pair.To.Io.State, Is.EqualTo(Bytes(1000, 3)));
    }

    [Test]
    public void ABrokenDeviceKeepsTheVmFromStartingUntilAReset()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy));
        vm.Vm.Cont();
        device.Io.Refuse[VfioDeviceState.Stop] = Errno.EIO;
        device.Io.ResetAnswer = Errno.EIO;
        Assert.That(Assert.Throws<DeviceStateException>(vm.Vm.Stop).Message, Does.Contain("broken"));
        Assert.That(device.State, Is.EqualTo(VfioDeviceState.Error));
        Assert.That(Assert.Throws<DeviceStateException>(vm.Vm.Cont).Message, Does.Contain("broken; reset the VM"));
        Assert.That(vm.Vm.RunState.IsRunning, Is.False);
        device.Io.ResetAnswer = Errno.None;
        vm.Vm.Reset();
        vm.Vm.Cont();
        Assert.That(device.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public async Task ARefusedStopResetsTheDeviceFailsTheMigrationAndTheVmGoesOn()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = Bytes(5, 1) }, _ => new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        pair.From.Io.Refuse[VfioDeviceState.Stop] = Errno.EBUSY;
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("RUNNING to STOP").And.Contain("EBUSY").And.Contain("was reset"));
        Assert.That((pair.From.Io.Resets, pair.From.Config.Reapplied), Is.EqualTo((1, 1)), "after a reset the VMM applies the guest's config again");
        pair.AssertOneSideRuns(atSource: true);
    }

    [Test]
    public async Task AFailureAtTheSourceEndsTheMigrationOverASocketWithAReturnPathToo()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = Bytes(5, 1) }, _ => new FakeVfioDevice("b", All));
        pair.From.Io.EndlessPrecopy = () => throw new VfioException("the device is gone", Errno.ENODEV);
        Task<MigrationStatus> incoming = pair.Destination.Engine.MigrateIncoming(global::Vmm.Migration.Channels.MigrationAddress.Parse("tcp:127.0.0.1:0"));
        int? port = pair.Destination.Engine.Query().SocketAddresses[0].Port;
        Task<MigrationStatus> outgoing = pair.Source.Engine.Migrate(global::Vmm.Migration.Channels.MigrationAddress.Parse($"tcp:127.0.0.1:{port}"));
        // The destination waits for more data, so the source must end without waiting for the destination.
        Assert.That(await outgoing.WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(await incoming.WaitAsync(VfioPair.Deadline), Is.EqualTo(MigrationStatus.Failed));
        pair.AssertOneSideRuns(atSource: true);
    }

    [Test]
    public async Task APausedVmsDeviceStaysStoppedWhenItsMigrationFails()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All) { State = Bytes(5, 1) }, _ => new FakeVfioDevice("b", All) { Accept = static _ => Errno.EIO });
        pair.Source.Vm.Stop();
        Assert.That(pair.From.State, Is.EqualTo(VfioDeviceState.Stop));
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.From.State, Is.EqualTo(VfioDeviceState.Stop), "a paused VM's device does no DMA");
        Assert.That(pair.Source.Vm.RunState.State, Is.EqualTo(RunState.Paused));
        pair.To.Io.Accept = static _ => Errno.None;
        await pair.MigrateWell();
        Assert.That(pair.To.State, Is.EqualTo(VfioDeviceState.Stop), "the device of a VM that arrives paused does no DMA either");
        pair.Destination.Vm.Cont();
        Assert.That(pair.To.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public async Task APagesDmaMarksReachTheDestination()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", All), _ => new FakeVfioDevice("b", All), ramBytes: 8 << 20);
        // The device writes by DMA, which the VMM does not see, while its precopy runs and once more on the way to STOP_COPY.
        int writes = 0;
        void Dma(ulong address, byte value)
        {
            pair.Source.Ram.Slice(address, 4096).Fill(value);
            lock (pair.From.Io.Written) pair.From.Io.Written.Add(address);
        }
        pair.From.Io.EndlessPrecopy = () =>
        {
            if (writes++ < 20) Dma((ulong)writes * 0x5000, (byte)writes);
            return [];
        };
        pair.From.Io.PrecopyInfo = () => new VfioPrecopyInfo(writes < 20 ? 1UL << 60 : 0, 0);
        pair.From.Io.Step = (_, s) =>
        {
            if (s == VfioDeviceState.StopCopy) Dma(0x700000, 0xee);
        };
        await pair.MigrateWell();
        RamAssert.AreEqual(pair.Source.Vm.Memory, pair.Destination.Vm.Memory);
        Assert.That(pair.Destination.Ram.ReadOnlySlice(0x700000, 1)[0], Is.EqualTo(0xee));
        Assert.That(pair.Destination.Ram.ReadOnlySlice(0x5000 * 20, 1)[0], Is.EqualTo(20));
    }

    [Test]
    public async Task AStateOfTwoGigabytesNeedsABufferOfOneMegabyte()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a", VfioMigrationFlags.StopCopy), _ => new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        const long total = 2L << 30;
        long left = total, taken = 0;
        pair.From.Io.DataSize = (ulong)total;
        pair.From.Io.ReadState = into =>
        {
            int n = (int)Math.Min(left, into.Length);
            left -= n;
            return n;
        };
        pair.To.Io.WriteState = from => taken += from.Length;
        long before = GC.GetTotalAllocatedBytes(precise: true);
        await pair.MigrateWell();
        long allocated = GC.GetTotalAllocatedBytes(precise: true) - before;
        Assert.That(taken, Is.EqualTo(total));
        // Parallel tests also allocate, so the limit is wide; it still fails if memory grows with the state.
        Assert.That(allocated, Is.LessThan(total / 4));
    }

    private static IEnumerable<int> FlagSets() => VfioStateArcs.FlagSets.Select(static f => (int)f);

    internal static byte[] Bytes(int length, int seed)
    {
        byte[] bytes = new byte[length];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }
}
