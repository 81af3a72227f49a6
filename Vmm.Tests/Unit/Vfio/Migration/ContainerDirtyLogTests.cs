using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>The devices or their container log DMA writes; a failed log makes all pages dirty (vfio-migration 3.10).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class ContainerDirtyLogTests
{
    [Test]
    public void DevicesLogWhenAllCan_ElseTheContainer([Values] bool second)
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        FakeVfioDevice a = new("a"), b = new("b") { HasDmaLog = second, SharedContainer = a };
        VfioPair.Add(vm, 0, a);
        VfioPair.Add(vm, 1, b);
        Start(vm);
        Assert.That((a.IsLogging, b.IsLogging), Is.EqualTo((true, second)), "if one device cannot log, the container, which is a's here, logs for both");
        Assert.That(a.Calls.Contains("StartDirtyLog"), Is.EqualTo(!second));
        Stop(vm);
        Assert.That((a.IsLogging, b.IsLogging), Is.EqualTo((false, false)));
    }

    [Test]
    public void MarksOfAllDevicesAddUp()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        FakeVfioDevice a = new("a"), b = new("b") { SharedContainer = a };
        VfioPair.Add(vm, 0, a);
        VfioPair.Add(vm, 1, b);
        Start(vm);
        a.Written.Add(0x3000);
        b.Written.Add(0xff000);
        Assert.That(Dirty(vm), Is.EqualTo((long[])[3, 255]));
        Assert.That(Dirty(vm), Is.Empty, "a report clears the log");
        Stop(vm);
    }

    [Test]
    public void ACoarseLogMarksAllPagesOfItsPage()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        var a = new FakeVfioDevice("a") { LogGranularityBytes = 16384 };
        VfioPair.Add(vm, 0, a);
        Assert.That(Start(vm), Is.EqualTo(16384));
        a.Written.Add(0x5000);
        Assert.That(Dirty(vm), Is.EqualTo((long[])[4, 5, 6, 7]));
        Stop(vm);
    }

    [Test]
    public void ALostLogMeansThatEverythingIsDirtyUntilTheNextStart()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        var a = new FakeVfioDevice("a");
        VfioPair.Add(vm, 0, a);
        Start(vm);
        a.FailAt = a.Calls.Count;
        Assert.That(Dirty(vm), Has.Length.EqualTo(256));
        Assert.That(Dirty(vm), Has.Length.EqualTo(256), "the lost log's marks are gone, so every page stays dirty");
        Stop(vm);
        Start(vm);
        Assert.That(Dirty(vm), Is.Empty);
        Stop(vm);
    }

    [Test]
    public void WithoutAnyLogEverythingIsDirtyAlways()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        VfioPair.Add(vm, 0, new FakeVfioDevice("a") { HasDmaLog = false, CanLogDirty = false }, new VfioMigrationOptions { Enable = VfioEnableMigration.On });
        Start(vm);
        Assert.That(Dirty(vm), Has.Length.EqualTo(256));
        Assert.That(Dirty(vm), Has.Length.EqualTo(256));
        Stop(vm);
    }

    [Test]
    public void ALogThatCannotStartStopsTheOthersAndIsNamed()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        FakeVfioDevice a = new("a"), b = new("b") { SharedContainer = a };
        VfioPair.Add(vm, 0, a);
        VfioPair.Add(vm, 1, b);
        b.FailAt = b.Calls.Count;
        Assert.That(Assert.Throws<VfioException>(() => Start(vm))!.Message, Is.EqualTo("device 'b' cannot log its DMA writes (EIO)"));
        Assert.That((a.IsLogging, vm.Vm.Memory.IsDirtyLogging), Is.EqualTo((false, false)));
    }

    [Test]
    public void TrackingDuringPrecopyCanBePutOff()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        var a = new FakeVfioDevice("a");
        FakeVfioPci device = VfioPair.Add(vm, 0, a, new VfioMigrationOptions { PreCopyDirtyPageTracking = false });
        vm.Vm.Cont();
        Start(vm);
        a.Written.Add(0x1000);
        Assert.That(Dirty(vm), Is.Empty, "the VMM does not read the log while the device runs");
        vm.Vm.Stop();
        Assert.That(device.State, Is.EqualTo(VfioDeviceState.Stop));
        Assert.That(Dirty(vm), Is.EqualTo((long[])[1]));
        Stop(vm);
    }

    [Test]
    public async Task WithoutAnyLogAMigrationConvergesWhenTrackingIsPutOff()
    {
        const ulong ram = 4 << 20;
        var options = new VfioMigrationOptions { Enable = VfioEnableMigration.On, PreCopyDirtyPageTracking = false };
        FakeVfioDevice NoLog(int i) => new("a") { HasDmaLog = false, CanLogDirty = false };
        using var pair = new VfioPair(NoLog, NoLog, options: options, ramBytes: ram);
        pair.Source.FilledRandom(3);
        // All of RAM is more than fits into the downtime, so a log that calls all of it dirty at each pass never ends.
        pair.Source.Engine.Parameters = pair.Source.Engine.Parameters with { DowntimeLimitMs = 10, MaxBandwidthBytesPerSecond = 64 << 20 };
        await pair.MigrateWell();
        RamAssert.AreEqual(pair.Source.Vm.Memory, pair.Destination.Vm.Memory);
        Assert.That(pair.Source.Engine.Query().Ram!.NormalPages, Is.GreaterThanOrEqualTo(2 * (long)ram / 4096), "once while the VM ran, and all of it after the stop, because any page may have been written");
    }

    [Test]
    public void TheLastHarvestOfAStoppedVmIsNeverPutOff()
    {
        using TestVm vm = VfioPair.Host(1 << 20, incoming: false);
        var a = new FakeVfioDevice("a", VfioMigrationFlags.StopCopy);
        VfioPair.Add(vm, 0, a, new VfioMigrationOptions { PreCopyDirtyPageTracking = false });
        vm.Vm.Cont();
        Start(vm);
        a.Written.Add(0x1000);
        a.Refuse[VfioDeviceState.Stop] = Errno.EIO;
        Assert.That(vm.Vm.Stop, Throws.TypeOf<DeviceStateException>());
        Assert.That(Dirty(vm), Is.EqualTo((long[])[1]), "the device was reset and is in RUNNING, and what it wrote before counts");
        Stop(vm);
    }

    private static uint Start(TestVm vm)
    {
        using (vm.Vm.Bql.Acquire()) return vm.Vm.Memory.StartDirtyLog();
    }

    private static void Stop(TestVm vm)
    {
        using (vm.Vm.Bql.Acquire()) vm.Vm.Memory.StopDirtyLog();
    }

    private static long[] Dirty(TestVm vm)
    {
        var bitmap = new DirtyBitmap(vm.Ram.PageCount);
        using (vm.Vm.Bql.Acquire()) vm.Vm.Memory.HarvestDirtyLog(vm.Ram, bitmap);
        return [.. Enumerable.Range(0, (int)bitmap.PageCount).Where(p => bitmap.IsSet(p)).Select(static p => (long)p)];
    }
}
