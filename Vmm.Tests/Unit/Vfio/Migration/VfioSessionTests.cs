using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>A device has one session at a time, and a new session starts without the figures of the previous one.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioSessionTests
{
    [Test]
    public void ASecondAttemptIsRefusedWhileASessionIsOpen([Values(1, 2)] int version, [Values] bool saving)
    {
        using TestVm vm = Host(version, out _, out SaveVmHandlers handlers);
        using var held = vm.Vm.Bql.Acquire();
        Action end = saving ? handlers.Save!.SavePrepare(new SaveContext()).Cleanup!.SaveCleanup : handlers.Load!.LoadSetup(new LoadContext()).Cleanup!.LoadCleanup;
        string reason = $"device 'fake' is being {(saving ? "saved" : "loaded")} by another attempt, which must end first";
        VfioException save = Assert.Throws<VfioException>(() => handlers.Save!.SavePrepare(new SaveContext()))!;
        VfioException load = Assert.Throws<VfioException>(() => handlers.Load!.LoadSetup(new LoadContext()))!;
        Assert.That((save.Message, save.Errno, load.Message, load.Errno), Is.EqualTo((reason, Errno.EBUSY, reason, Errno.EBUSY)));
        end();
        handlers.Save!.SavePrepare(new SaveContext()).Cleanup!.SaveCleanup();
        handlers.Load!.LoadSetup(new LoadContext()).Cleanup!.LoadCleanup();
    }

    [Test]
    public void AStreamIsCheckedWhileASessionIsOpen([Values(1, 2)] int version)
    {
        using TestVm vm = Host(version, out FakeVfioPci device, out SaveVmHandlers handlers);
        using var held = vm.Vm.Bql.Acquire();
        SaveRoles save = handlers.Save!.SavePrepare(new SaveContext());
        VfioDeviceState before = device.State;
        handlers.Load!.LoadSetup(new LoadContext { ValidateOnly = true }).Cleanup!.LoadCleanup();
        Assert.That(device.State, Is.EqualTo(before));
        Assert.Throws<VfioException>(() => handlers.Save!.SavePrepare(new SaveContext()), "the check has not closed the save session, which it did not open");
        save.Cleanup!.SaveCleanup();
    }

    [Test]
    public void ALoadThatTheDeviceRefusesLeavesNoSessionOpen()
    {
        using TestVm vm = Host(2, out FakeVfioPci device, out SaveVmHandlers handlers);
        using var held = vm.Vm.Bql.Acquire();
        device.Io.Refuse[VfioDeviceState.Resuming] = Errno.EIO;
        Assert.Throws<VfioException>(() => handlers.Load!.LoadSetup(new LoadContext()));
        Assert.That(device.Io.OpenSessions, Is.Zero);
        LoadRoles load = handlers.Load!.LoadSetup(new LoadContext());
        Assert.That((device.State, device.Io.OpenSessions), Is.EqualTo((VfioDeviceState.Resuming, 1)));
        load.Cleanup!.LoadCleanup();
        Assert.That(device.Io.OpenSessions, Is.Zero);
    }

    [Test]
    public void TheNextAttemptHasNoFiguresAndNoVoidPartOfTheLast([Values(1, 2)] int version)
    {
        using TestVm vm = Host(version, out FakeVfioPci device, out SaveVmHandlers handlers);
        vm.Vm.Cont();
        SaveRoles first, second;
        using (vm.Vm.Bql.Acquire())
        {
            first = handlers.Save!.SavePrepare(new SaveContext());
            first.Setup!.SaveSetup(new QemuFileWriter(new MemoryChannel()));
            Assert.That(first.Live!.ExactPending().TotalBytes, Is.GreaterThan(0));
        }
        first.Live!.SaveLiveIterate(new QemuFileWriter(new MemoryChannel()), IterateBudget.Unlimited);
        using (vm.Vm.Bql.Acquire())
        {
            device.Migration.Protocol!.SetState(VfioDeviceState.Running, VfioDeviceState.Error);
            first.Cleanup!.SaveCleanup();
            second = handlers.Save!.SavePrepare(new SaveContext());
            Assert.That(second.Live!.EstimatePending().TotalBytes, Is.Zero);
            // The v2 device ran again after it had sent a part. This call would fail if the part still counted.
            second.Live.SaveLiveCompletePrecopy(new QemuFileWriter(new MemoryChannel()));
            second.Cleanup!.SaveCleanup();
        }
    }

    private static TestVm Host(int version, out FakeVfioPci device, out SaveVmHandlers handlers)
    {
        var io = new FakeVfioDevice { State = VfioMigrationTests.Bytes(5000, 1) };
        if (version == 1) io.V1 = new FakeV1Region(4096) { Data = VfioMigrationTests.Bytes(5000, 1), ChunkBytes = 1000 };
        TestVm vm = VfioPair.Host(64 << 10, incoming: false);
        device = VfioPair.Add(vm, 0, io);
        handlers = vm.Vm.SaveVm.Entries().Single(static e => e.IdStr == "0000:00:02.0/vfio").Handlers!;
        return vm;
    }
}
