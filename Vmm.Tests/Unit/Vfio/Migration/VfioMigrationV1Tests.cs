using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>Protocol v1 over a fake region behaves as in QEMU 7.2 (vfio-migration 5).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioMigrationV1Tests
{
    /// <summary>Data offset, data size and mapped areas of a region; some areas are unsorted and have holes.</summary>
    private static readonly (string Name, int DataBytes, uint Offset, VfioRegionArea[] Areas)[] s_windows =
    [
        ("unmapped", 16384, 0x1000, []),
        ("whole section mapped", 16384, 0x1000, [new(0x1000, 0x4000)]),
        ("sparse and unsorted", 16384, 0x1000, [new(0x4000, 0x1000), new(0x2000, 0x1000)]),
        ("small", 512, 0x40, []),
        ("mapped from the middle of a page of data", 12288, 0x1800, [new(0x2000, 0x1000)]),
    ];

    [Test]
    public async Task DataArriveThroughEveryPairOfWindows([Range(0, 4)] int from, [Range(0, 4)] int to, [Values(1, 700, 40_000)] int bytes)
    {
        byte[] data = VfioMigrationTests.Bytes(bytes, from * 10 + to);
        using var pair = new VfioPair(_ => Device(from, v1 => (v1.Data, v1.ChunkBytes) = (data, 5000)), _ => Device(to));
        await pair.MigrateWell();
        FakeV1Region source = pair.From.Io.V1!, destination = pair.To.Io.V1!;
        Assert.That(destination.Committed.SelectMany(static c => c), Is.EqualTo(data), $"{s_windows[from].Name} to {s_windows[to].Name}");
        Assert.That(destination.Committed.Max(static c => c.Length), Is.LessThanOrEqualTo(s_windows[to].DataBytes), "the destination splits a chunk to the size of its data section");
        Assert.That(source.States, Is.EqualTo((uint[])[3, 2, 0]), "pre-copy, stop-and-copy, stopped");
        Assert.That(destination.States, Is.EqualTo((uint[])[4, 1]), "resuming, running");
        if (from == 1) Assert.That(source.SlowAccesses, Is.Zero, "the source reads a mapped section without calls");
        if (to == 0) Assert.That(destination.SlowAccesses, Is.GreaterThan(0));
        pair.AssertOneSideRuns(atSource: false);
    }

    [Test]
    public async Task ChunksAreSplitButNeverJoined()
    {
        using var pair = new VfioPair(
            _ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = VfioMigrationTests.Bytes(96, 1), ChunkSizes = [24, 64, 8] } },
            _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(40) });
        await pair.MigrateWell();
        Assert.That(pair.To.Io.V1!.Committed.Select(static c => c.Length), Is.EqualTo((int[])[24, 40, 24, 8]));
    }

    [Test]
    public async Task ReservedStateBitsArePreserved()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [1], State = 0xabcd_0001 } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        await pair.MigrateWell();
        Assert.That(pair.From.Io.V1!.States, Is.EqualTo((uint[])[0xabcd_0003, 0xabcd_0002, 0xabcd_0000]));
    }

    [TestCase(0u, true)]
    [TestCase(1u, true)]
    [TestCase(2u, true)]
    [TestCase(3u, true)]
    [TestCase(4u, true)]
    [TestCase(5u, false)]
    [TestCase(6u, false)]
    [TestCase(7u, false)]
    public void OnlyValidStatesAreWritten(uint state, bool valid)
    {
        Assert.That(VfioMigrationRegion.IsValid(0xfffffff8 | state), Is.EqualTo(valid));
        Assert.That(VfioMigrationRegion.IsError(0xfffffff8 | state), Is.EqualTo(state == 6));
    }

    [Test]
    public async Task AnInvalidTransitionIsNotWritten()
    {
        // The device reports RESUMING (4); adding the SAVING bit (2) would make 6, which is no valid state.
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [1] } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        pair.From.Io.V1!.State = 4;
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("RUNNING to PRE_COPY (EINVAL)"));
        Assert.That(pair.From.Io.V1.States, Has.None.AnyOf(5u, 6u, 7u));
    }

    [Test]
    public async Task ADeviceThatBreaksIsResetAndTheMigrationFails()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [1], BreakAt = 2 } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain("PRE_COPY to STOP_COPY").And.Contain("was reset"));
        Assert.That((pair.From.Io.Resets, pair.From.Config.Reapplied), Is.EqualTo((1, 1)));
        pair.AssertOneSideRuns(atSource: true);
    }

    [Test]
    public async Task PendingBytesWithoutDataEndTheCompletion()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { LiesAboutPending = true } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        await pair.MigrateWell();
        Assert.That(pair.To.Io.V1!.Committed, Is.Empty);
    }

    [TestCase(0UL, null, "data_offset")]
    [TestCase(8UL, null, "data_offset")]
    [TestCase(0x3000UL, null, "data_offset")]
    [TestCase(ulong.MaxValue, null, "data_offset")]
    [TestCase(null, 0x1001UL, "data_size")]
    [TestCase(null, ulong.MaxValue, "data_size")]
    public async Task WhatTheDeviceSaysAboutPlacesIsChecked(ulong? offset, ulong? size, string named)
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [1, 2], BadOffset = offset, BadSize = size } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        (MigrationStatus source, _) = await pair.Migrate();
        Assert.That(source, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Source.Engine.Query().Error!.ToString(), Does.Contain(named).And.Contain("'a'"));
        pair.AssertOneSideRuns(atSource: true);
    }

    [Test]
    public void ASnapshotStopsTheDeviceIntoSaving()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [1, 2, 3] } });
        vm.Vm.Cont();
        using (vm.Vm.Bql.Acquire()) vm.Vm.RunState.Stop(RunState.SaveVm);
        Assert.That(device.Io.V1!.State, Is.EqualTo(2));
        using (vm.Vm.Bql.Acquire()) vm.Vm.RunState.Start();
        Assert.That(device.Io.V1.State, Is.EqualTo(1));
        vm.Vm.Stop();
        Assert.That(device.Io.V1.State, Is.Zero, "an ordinary stop does not begin to save");
    }

    [Test]
    public async Task APausedVmBeginsInStopAndCopy()
    {
        using var pair = new VfioPair(_ => new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) { Data = [9] } }, _ => new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        pair.Source.Vm.Stop();
        await pair.MigrateWell();
        Assert.That(pair.From.Io.V1!.States, Is.EqualTo((uint[])[0, 2, 0]));
        Assert.That(pair.To.Io.V1!.States, Is.EqualTo((uint[])[4]), "the device stays in RESUMING until the VM starts");
    }

    private static FakeVfioDevice Device(int window, Action<FakeV1Region>? setup = null)
    {
        (_, int bytes, uint offset, VfioRegionArea[] areas) = s_windows[window];
        var region = new FakeV1Region(bytes, offset, areas);
        setup?.Invoke(region);
        return new FakeVfioDevice(window.ToString()) { V1 = region };
    }
}
