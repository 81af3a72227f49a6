using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>A device that blocks its VM's migration says why (vfio-migration 3.1).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioBlockerTests
{
    private const VfioMigrationFlags Both = VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P;

    private static readonly (string Name, Func<FakeVfioDevice> Make, string Reason)[] s_unfit =
    [
        ("no support", static () => new FakeVfioDevice("d", VfioMigrationFlags.None), "does not support migration"),
        ("no stop-copy", static () => new FakeVfioDevice("d", VfioMigrationFlags.P2P), "lacks STOP_COPY"),
        ("probe fails", static () => new FakeVfioDevice("d") { FailAt = 0, FailWith = Errno.EIO }, "failed to say whether it supports migration (EIO)"),
        ("precopy info v2 fails", static () => new FakeVfioDevice("d") { FailAt = 1, FailWith = Errno.EFAULT }, "precopy info v2 (EFAULT)"),
        ("no dirty log at all", static () => new FakeVfioDevice("d") { HasDmaLog = false, CanLogDirty = false }, "log DMA writes"),
        ("v1 region without room", static () => new FakeVfioDevice("d") { V1 = new FakeV1Region(0, 0x20) }, "no room for data"),
        ("bitmap too short", static () => new FakeVfioDevice("d") { HasDmaLog = false, MaxDirtyBitmapBytes = 1 }, "dirty bitmap"),
    ];

    [Test]
    public void AnUnfitDeviceBlocksOrdinaryMigrationOnlyAndSaysWhy([Range(0, 6)] int which)
    {
        (_, Func<FakeVfioDevice> make, string reason) = s_unfit[which];
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, make());
        string blocked = vm.Engine.Query().BlockedReasons.Single();
        Assert.That(blocked, Does.Contain("'vfio0'").And.Contain(reason));
        Assert.That(device.Migration.BlockedReason, Is.EqualTo(blocked));
        MigrationBlockers blockers = vm.FullEngine.Context.Blockers;
        Assert.That(blockers.Reasons(MigrationMode.CprTransfer), Is.Empty, "the blocker leaves CPR possible");
        Assert.That(Assert.Throws<MigrationBlockedException>(() => vm.Engine.Migrate(new MemoryChannel()))!.Message, Does.Contain(reason));
        Assert.That(vm.Vm.SaveVm.Entries().Select(static e => e.IdStr), Has.None.Contains("/vfio"));
        vm.Vm.Cont();
    }

    [Test]
    public void WithMigrationAskedForAnUnfitDeviceIsNotRealized([Values(0, 1, 2, 3, 5, 6)] int which)
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioDevice io = s_unfit[which].Make();
        VfioException e = Assert.Throws<VfioException>(() => VfioPair.Add(vm, 0, io, new VfioMigrationOptions { Enable = VfioEnableMigration.On }))!;
        Assert.That(e.Message, Does.Contain(s_unfit[which].Reason).And.Contain("enable-migration=on"));
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
        io.Dispose();
    }

    [Test]
    public void WithMigrationAskedForTheLackOfALogIsOnlyAWarning()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        VfioPair.Add(vm, 0, new FakeVfioDevice("d") { HasDmaLog = false, CanLogDirty = false }, new VfioMigrationOptions { Enable = VfioEnableMigration.On });
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
    }

    [Test]
    public void SwitchedOffItBlocks()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("d"), new VfioMigrationOptions { Enable = VfioEnableMigration.Off });
        Assert.That(vm.Engine.Query().BlockedReasons.Single(), Does.Contain("enable-migration=off"));
        Assert.That(device.Io.Calls, Is.Empty, "the VMM does not ask the device");
    }

    [Test]
    public void SeveralDevicesMustAllSpeakP2P()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        VfioPair.Add(vm, 0, new FakeVfioDevice("a", Both));
        VfioPair.Add(vm, 1, new FakeVfioDevice("b", Both));
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
        FakeVfioPci odd = VfioPair.Add(vm, 2, new FakeVfioDevice("c", VfioMigrationFlags.StopCopy));
        Assert.That(vm.Engine.Query().BlockedReasons.Single(), Does.Contain("'vfio2'").And.Contain("P2P"));
        using (vm.Vm.Bql.Acquire()) odd.Migration.Dispose();
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty, "removing the device removes its blocker");
    }

    [Test]
    public void TwoV1DevicesAreRefusedTogether()
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        VfioPair.Add(vm, 0, new FakeVfioDevice("a") { V1 = new FakeV1Region(4096) });
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
        VfioPair.Add(vm, 1, new FakeVfioDevice("b") { V1 = new FakeV1Region(4096) });
        Assert.That(vm.Engine.Query().BlockedReasons.Single(), Does.Contain("P2P"));
    }

    [Test]
    public void ADeviceThatMustMigrateIsRefusedBesideOthersWithoutP2P([Values] bool newHasP2P)
    {
        using TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        VfioPair.Add(vm, 0, new FakeVfioDevice("a", newHasP2P ? VfioMigrationFlags.StopCopy : Both));
        using var io = new FakeVfioDevice("b", newHasP2P ? Both : VfioMigrationFlags.StopCopy);
        VfioException e = Assert.Throws<VfioException>(() => VfioPair.Add(vm, 1, io, new VfioMigrationOptions { Enable = VfioEnableMigration.On }))!;
        Assert.That(e.Message, Does.Contain("'vfio1'").And.Contain("P2P").And.Contain("enable-migration=on"));
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty, "the device that was refused blocks nothing");
    }

    [Test]
    public void OnlyMigratableRefusesWhoeverWouldBlock([Range(0, 6)] int which)
    {
        using TestVm vm = OnlyMigratable();
        using FakeVfioDevice io = s_unfit[which].Make();
        Assert.That(() => VfioPair.Add(vm, 0, io), Throws.TypeOf<MigrationBlockedException>()
            .With.Message.StartsWith("disallowing migration blocker (--only-migratable) for: device 'vfio0'").And.Message.Contains(s_unfit[which].Reason));
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
    }

    [Test]
    public void OnlyMigratableRefusesASecondDeviceWithoutP2PAndLetsCprBlockersBe()
    {
        using TestVm vm = OnlyMigratable();
        VfioPair.Add(vm, 0, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy));
        using var io = new FakeVfioDevice("b", VfioMigrationFlags.StopCopy);
        Assert.That(() => VfioPair.Add(vm, 1, io), Throws.TypeOf<MigrationBlockedException>().With.Message.Contains("(--only-migratable)").And.Message.Contains("P2P"));
        MigrationBlockers blockers = vm.FullEngine.Context.Blockers;
        using IDisposable cpr = blockers.Add("no CPR", MigrationModes.CprTransfer | MigrationModes.CprExec);
        Assert.That(blockers.Reasons(MigrationMode.CprExec), Does.Contain("no CPR"));
        Assert.That(() => blockers.Add("everything"), Throws.TypeOf<MigrationBlockedException>().With.Message.EqualTo("disallowing migration blocker (--only-migratable) for: everything"));
    }

    private static TestVm OnlyMigratable() => new(
        new Vmm.Core.Devices.VmOptions { Memory = [new Vmm.Core.Memory.RamBlockOptions { Name = "m", SizeBytes = 64 << 10 }], OnlyMigratable = true },
        static b => b.AddPlugin<Vmm.Devices.Vfio.VfioPlugin>());

    [Test]
    public void OptionsAreReadAndRefusedByName()
    {
        var options = Vmm.Core.Devices.DeviceOptions.Parse("vfio-pci,enable-migration=on,x-device-dirty-page-tracking=off,x-pre-copy-dirty-page-tracking=off,migration-events=on");
        Assert.That(VfioMigrationOptions.Read(options), Is.EqualTo(new VfioMigrationOptions
        {
            Enable = VfioEnableMigration.On, DeviceDirtyPageTracking = false, PreCopyDirtyPageTracking = false, MigrationEvents = true,
        }));
        ConfigurationException e = Assert.Throws<ConfigurationException>(() => VfioMigrationOptions.Read(Vmm.Core.Devices.DeviceOptions.Parse("vfio-pci,enable-migration=maybe")))!;
        Assert.That(e.Message, Does.Contain("'enable-migration' expects on, off or auto, found 'maybe'"));
    }
}
