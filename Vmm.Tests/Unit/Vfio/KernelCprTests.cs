using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Migration;
using Vmm.Devices.Vfio.Uapi;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>A kernel device moves to another process: the calls that both processes make, also after a failure (vfio-migration 7.5, 7.6).</summary>
internal sealed class KernelCprTests
{
    private const string Name = "0000:00:01.0", Uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    private const ulong Size = 4 << 20;
    private FakeVfioHost _host = null!;

    [SetUp]
    public void SetUp()
    {
        _host = new FakeVfioHost();
        _host.Kernel.Extensions.Add(VfioUapi.VFIO_UPDATE_VADDR);
        _host.AddPci(Name);
        _host.Memory.AddBlock(new RamBlockOptions { Name = "low", SizeBytes = Size });
        _host.Memory.AddBlock(new RamBlockOptions { Name = "high", SizeBytes = Size });
    }

    [TearDown]
    public void TearDown() => _host.Dispose();

    [Test]
    public void TheNextProcessMovesTheMappingsAndTouchesNothingElse()
    {
        using KernelVfioDeviceIo old = Open();
        old.SuspendCpr();
        Assert.That(_host.Kernel.Suspended, Has.Count.EqualTo(2));
        using var next = new NextProcess(_host, old);
        _host.Kernel.Calls.Clear();
        int accesses = _host.Kernel.Accesses.Count(static a => a.IsWrite);
        KernelVfioDeviceIo io = next.Open();
        Assert.That((io.Reset(), io.RegionWrite(0, 0, [1, 2, 3, 4]), io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 0, 0, 0), [], [])),
            Is.EqualTo((Errno.None, Errno.None, Errno.None)));
        Assert.That(_host.Kernel.Calls, Is.EqualTo(new[] { "container: GET_INFO", "device: GET_INFO", "device: GET_REGION_INFO" }).Or.EqualTo(new[] { "container: GET_INFO", "device: GET_INFO" }));
        io.LoadCpr();
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(_host.Kernel.Mappings.Values.Select(static m => m.From), Is.EqualTo(next.Memory.Blocks.Select(static b => (ulong)b.HostAddress)));
        Assert.That(_host.Kernel.Accesses.Count(static a => a.IsWrite), Is.EqualTo(accesses));
        old.HandOverCpr();
        io.ResumeCpr();
        _host.Kernel.Calls.Clear();
        old.Dispose();
        Assert.That(_host.Kernel.Calls, Is.Empty, "the old process only closes its descriptors");
        io.Dispose();
        Assert.That(_host.Kernel.Calls, Does.Contain("container: UNMAP_DMA").And.Contain("group 7: UNSET_CONTAINER"));
    }

    [TestCase(0, TestName = "AfterAFailureTheOldProcessHasItsAddressesAgain(the next took none)")]
    [TestCase(1, TestName = "AfterAFailureTheOldProcessHasItsAddressesAgain(the next took some)")]
    [TestCase(2, TestName = "AfterAFailureTheOldProcessHasItsAddressesAgain(the next took all)")]
    public void AfterAFailureTheOldProcessHasItsAddressesAgain(int taken)
    {
        using KernelVfioDeviceIo old = Open();
        ulong[] before = [.. Addresses];
        old.SuspendCpr();
        // A next process that was killed gives no mapping back.
        foreach (ulong place in _host.Kernel.Mappings.Keys.Take(taken).ToArray())
        {
            _host.Kernel.Mappings[place] = _host.Kernel.Mappings[place] with { From = 0xdead000 };
            _host.Kernel.Suspended.Remove(place);
        }
        old.ResumeCpr();
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(Addresses, Is.EqualTo(before));
        old.SuspendCpr();
        Assert.That(_host.Kernel.Suspended, Has.Count.EqualTo(2), "the old process can suspend again");
        old.ResumeCpr();
    }

    [Test]
    public void ANextProcessThatFailsLateDoesNotTakeTheAddressesFromTheOldOne()
    {
        using KernelVfioDeviceIo old = Open();
        ulong[] before = [.. Addresses];
        old.SuspendCpr();
        using (var next = new NextProcess(_host, old))
        {
            next.Open().LoadCpr();
            old.ResumeCpr();
        }
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(Addresses, Is.EqualTo(before));
    }

    [Test]
    public void AMoveThatTheKernelRefusesHalfWayIsUndoneByTheOldProcess()
    {
        using KernelVfioDeviceIo old = Open();
        ulong[] before = [.. Addresses];
        old.SuspendCpr();
        using (var next = new NextProcess(_host, old))
        {
            KernelVfioDeviceIo io = next.Open();
            _host.Kernel.Mappings[Size] = _host.Kernel.Mappings[Size] with { Size = Size / 2 };
            Assert.That(io.LoadCpr, Throws.TypeOf<VfioException>().With.Message.Contains("RAM block 'high'"));
            _host.Kernel.Mappings[Size] = _host.Kernel.Mappings[Size] with { Size = Size };
            Assert.That(_host.Kernel.Suspended, Is.EqualTo((ulong[])[Size]), "the next process gives no mapping back");
        }
        old.ResumeCpr();
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(Addresses, Is.EqualTo(before));
    }

    [Test]
    public void ANextProcessThatFailsWhileTheOldOneGoesOnTakesNothingFromIt()
    {
        using KernelVfioDeviceIo old = Open();
        ulong[] before = [.. Addresses];
        old.SuspendCpr();
        using (var next = new NextProcess(_host, old))
        {
            KernelVfioDeviceIo io = next.Open();
            _host.Kernel.BeforeMoves.Enqueue(static () => { });
            _host.Kernel.BeforeMoves.Enqueue(old.ResumeCpr);
            Assert.That(io.LoadCpr, Throws.TypeOf<VfioException>().With.Message.Contains("RAM block 'high'"));
        }
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(Addresses, Is.EqualTo(before));
        old.SuspendCpr();
        old.ResumeCpr();
    }

    [TestCase(2)]
    [TestCase(3)]
    [TestCase(4)]
    public void AnAddressThatTheNextProcessTakesInBetweenIsTakenBackAgain(int times)
    {
        using KernelVfioDeviceIo old = Open();
        ulong[] before = [.. Addresses];
        old.SuspendCpr();
        for (int i = 0; i < times; i++) _host.Kernel.BeforeMoves.Enqueue(Take);
        if (times > 3) Assert.That(old.ResumeCpr, Throws.TypeOf<VfioException>().With.Message.Contains("RAM block 'low'"), "the old process does not try for ever");
        else old.ResumeCpr();
        if (times > 3) old.ResumeCpr();
        Assert.That(_host.Kernel.Suspended, Is.Empty);
        Assert.That(Addresses, Is.EqualTo(before));

        void Take()
        {
            _host.Kernel.Mappings[0] = _host.Kernel.Mappings[0] with { From = 0xdead000 };
            _host.Kernel.Suspended.Remove(0);
        }
    }

    [Test]
    public void ARefusedSuspensionIsAnErrorAndChangesNothing()
    {
        using KernelVfioDeviceIo old = Open();
        _host.Kernel.FailOnce["container: UNMAP_DMA VADDR"] = Errno.EBUSY;
        Assert.That(old.SuspendCpr, Throws.TypeOf<VfioException>().With.Message.Contains("cannot suspend"));
        _host.Kernel.Calls.Clear();
        old.ResumeCpr();
        Assert.That(_host.Kernel.Calls, Is.Empty);
    }

    [Test]
    public void WhatCannotChangeProcessSaysWhy()
    {
        using (KernelVfioDeviceIo io = Open()) Assert.That(io.CprBlockedReason, Is.Null);
        _host.Kernel.Extensions.Remove(VfioUapi.VFIO_UPDATE_VADDR);
        using (KernelVfioDeviceIo io = Open()) Assert.That(io.CprBlockedReason, Does.Contain("VFIO_UPDATE_VADDR"));
        _host.AddMediated(Uuid, group: "9");
        using KernelVfioDeviceIo mdev = _host.Open($"sysfsdev={_host.Paths.MediatedDevices}/{Uuid}");
        Assert.That(mdev.CprBlockedReason, Does.Contain("mediated").And.Contain("suspend"));
    }

    [Test]
    public void AnIommufdDeviceIsRefusedForWhatItsKernelLacks()
    {
        const string name = "0000:00:02.0";
        _host.AddPci(name, group: "8", cdev: "vfio0");
        _host.AddNode(_host.Paths.Iommufd);
        using KernelVfioDeviceIo io = _host.Open($"host={name},iommufd=on");
        Assert.That(io.CprBlockedReason, Does.Contain("no IOMMU_IOAS_CHANGE_PROCESS").And.Contain("6.13").And.Contain("iommufd=off"));
        _host.Kernel.ChangesProcess = true;
        Assert.That(io.CprBlockedReason, Does.Contain("this version of vmm").And.Contain("iommufd=off"));
        _host.Kernel.FailOnce["iommufd: IOAS_CHANGE_PROCESS"] = Errno.EINVAL;
        Assert.That(io.CprBlockedReason, Does.Contain("mapped by address"));
        _host.AddMediated(Uuid, group: "9", cdev: "vfio1");
        using KernelVfioDeviceIo mdev = _host.Open($"sysfsdev={_host.Paths.MediatedDevices}/{Uuid},iommufd=on");
        Assert.That(mdev.CprBlockedReason, Does.Contain("mediated").And.Contain("suspend"));
    }

    [TestCase(RunState.Running, false, false)]
    [TestCase(RunState.Suspended, false, true)]
    [TestCase(RunState.Paused, true, true)]
    public void ARebootNeedsASuspendedGuest(RunState state, bool wasSuspended, bool isAllowed)
    {
        using KernelVfioDeviceIo io = _host.Open($"host={Name}");
        using var cpr = new VfioCprPci("dev0", "0000:00:02.0", io, null!, _host.Services) { Interrupts = static _ => { } };
        using (_host.Services.Bql.Acquire())
        {
            IRunStateNotifier vm = _host.Services.Notifier;
            vm.Start();
            if (state != RunState.Running) vm.Stop(state);
            vm.WasSuspended = wasSuspended;
            Assert.That(() => _host.Services.Notifiers.Notify(MigrationEvent.PrecopySetup, MigrationMode.CprReboot),
                isAllowed ? Throws.Nothing : Throws.TypeOf<MigrationBlockedException>().With.Message.Contains("'dev0'").And.Message.Contains("suspended"));
            Assert.That(_host.Services.Blockers.Reasons(MigrationMode.CprTransfer), Is.Empty);
        }
    }

    [Test]
    public void ADeviceThatCannotBeTakenBackStillInterrupts([Values] bool arrives)
    {
        using KernelVfioDeviceIo io = _host.Open($"host={Name}");
        var seen = new List<string>();
        using var cpr = new VfioCprPci("dev0", "0000:00:02.0", io, null!, _host.Services) { Interrupts = on => seen.Add(on ? "on" : "off"), Arrived = () => seen.Add("arrived") };
        if (!arrives) _host.Services.Notifiers.Notify(MigrationEvent.PrecopySetup, MigrationMode.CprTransfer);
        else _host.Services.CprFds.Receive(new CprIncoming(MigrationMode.CprTransfer, [], []));
        io.SuspendCpr();
        _host.Kernel.FailOnce["container: MAP_DMA VADDR"] = Errno.EIO;
        Assert.That(() =>
        {
            if (arrives) _host.Services.CprFds.EndIncoming();
            else _host.Services.Notifiers.Notify(MigrationEvent.PrecopyFailed, MigrationMode.CprTransfer);
        }, Throws.TypeOf<VfioException>().With.Message.Contains("RAM block 'low'"));
        Assert.That(seen, Is.EqualTo(arrives ? new[] { "on", "arrived" } : ["off", "on"]));
        Assert.That(cpr.IsActive, Is.False);
        io.ResumeCpr();
    }

    [Test]
    public void ADescriptorThatDidNotComeIsNamed()
    {
        using var memory = new GuestMemory();
        using var table = new CprFdTable();
        table.Receive(new CprIncoming(MigrationMode.CprTransfer, [], []));
        using var containers = new VfioContainers(memory, _host.Kernel, _host.Paths, NullLoggerFactory.Instance);
        Assert.That(() => containers.Open(VfioDeviceChoice.From(DeviceOptions.Parse($"vfio-pci,host={Name}"), _host.Paths), table),
            Throws.TypeOf<IncompatibleStateException>().With.Message.Contains("vfio_container_for_group' 7"));
    }

    /// <summary>A paused VM's device is in STOP. The next process must not reset it as a leftover, because a reset would lose the device's state.</summary>
    [Test]
    public void AStoppedDeviceArrivesStopped()
    {
        using KernelVfioDeviceIo old = Open();
        FakeKernelDevice device = _host.Kernel.Devices[0];
        device.Features[(ushort)VfioDeviceFeature.Migration] = [(byte)(VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P), 0, 0, 0, 0, 0, 0, 0];
        device.Features[(ushort)VfioDeviceFeature.DmaLoggingStart] = [];
        device.MigState = (uint)VfioDeviceState.Stop;
        old.SuspendCpr();
        using var next = new NextProcess(_host, old);
        KernelVfioDeviceIo io = next.Open();
        TestServices? services = null;
        using ServiceProvider scope = new ServiceCollection().AddSingleton<IDeviceServices>(_ => services!).AddSingleton<VfioMigrationHost>().BuildServiceProvider();
        services = new TestServices { Scope = scope };
        services.CprFds.Receive(new CprIncoming(MigrationMode.CprTransfer, [], []));
        _host.Kernel.Calls.Clear();
        using (services.Bql.Acquire())
        using (VfioMigration migration = VfioMigration.Realize("dev0", "0000:00:02.0", io, new FakeConfigState(), new VfioMigrationOptions(), services))
        {
            io.LoadCpr();
            old.HandOverCpr();
            services.CprFds.EndIncoming();
            io.ResumeCpr();
            migration.ReadStateAfterCpr();
            Assert.That(migration.Protocol!.State, Is.EqualTo(VfioDeviceState.Stop));
            migration.Protocol.SetState(VfioDeviceState.Running, VfioDeviceState.Error);
        }
        Assert.That(device.MigState, Is.EqualTo((uint)VfioDeviceState.Running));
        Assert.That(_host.Kernel.Calls, Does.Not.Contain("device: RESET"));
        services.Dispose();
    }

    private IEnumerable<ulong> Addresses => _host.Kernel.Mappings.Values.Select(static m => m.From);

    private KernelVfioDeviceIo Open()
    {
        KernelVfioDeviceIo io = _host.Open($"host={Name}");
        io.EnterCpr(_host.Services.CprFds, "dev0");
        return io;
    }

    /// <summary>The process that takes over: it has its own mapping of the same RAM layout, and descriptors as SCM_RIGHTS duplicates them.</summary>
    private sealed class NextProcess : IDisposable
    {
        private readonly FakeVfioHost _host;
        private readonly CprFdTable _table = new();
        private readonly VfioContainers _containers;
        private KernelVfioDeviceIo? _io;

        internal NextProcess(FakeVfioHost host, KernelVfioDeviceIo old)
        {
            Assert.That(old.Container.Name, Is.Not.Empty);
            _host = host;
            foreach (RamBlock block in host.Memory.Blocks) Memory.AddBlock(new RamBlockOptions { Name = block.Name, SizeBytes = block.SizeBytes }, block.Address);
            _table.Receive(new CprIncoming(MigrationMode.CprTransfer, [.. host.Services.CprFds.Entries().Select(e => e with { Fd = host.Kernel.Pass(e.Fd) })], []));
            _containers = new VfioContainers(Memory, host.Kernel, host.Paths, NullLoggerFactory.Instance);
        }

        internal GuestMemory Memory { get; } = new();

        internal KernelVfioDeviceIo Open() => _io = _containers.Open(VfioDeviceChoice.From(DeviceOptions.Parse($"vfio-pci,host={Name}"), _host.Paths), _table);

        public void Dispose()
        {
            _io?.Dispose();
            _containers.Dispose();
            _table.Dispose();
            Memory.Dispose();
        }
    }
}
