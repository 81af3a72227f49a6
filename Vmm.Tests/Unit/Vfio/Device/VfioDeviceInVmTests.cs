using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

/// <summary>The device in a whole VM, which the product's own service registrations put together.</summary>
[TestFixture]
public sealed class VfioDeviceInVmTests
{
    [Test]
    public void AnInterruptReachesWhoRunsTheVcpus()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical(), second = VfioDeviceFixture.Typical();
        var target = new RecordingInterruptController();
        using (var machine = new TestVm(new VmOptions()))
        using (var other = new TestVm(new VmOptions()))
        {
            PciHost pci = Add(machine, io), otherPci = Add(other, second);
            using (machine.Vm.Bql.Acquire()) machine.Vm.Services.GetRequiredService<InterruptRouter>().Attach(target);
            pci.PioWrite(0xcf8, 4, 0x80000810);
            pci.PioWrite(0xcfc, 4, 0xfe000000);
            pci.PioWrite(0xcf8, 4, 0x80000804);
            pci.PioWrite(0xcfc, 2, 7);
            io.Memory(0)[4] = 0x42;
            io.Fire(VfioPciIrq.Intx);
            second.Fire(VfioPciIrq.Intx);
            target.WaitFor(static t => t.Levels[1], "INTx");
            Assert.That(pci.MmioRead(new GuestAddress(0xfe000004), 1), Is.EqualTo(0x42));
            Assert.That(otherPci.MmioRead(new GuestAddress(0xfe000004), 1), Is.EqualTo(0xff), "the other VM's device has no address");
            Assert.That(target.Intx, Is.EqualTo(((int, bool)[])[(0, false), (1, false), (2, false), (3, false), (1, true), (1, false)]));
            InterruptRouter dropped = other.Vm.Services.GetRequiredService<InterruptRouter>();
            LeakCheck.WaitFor(() => dropped.DroppedIntx == 1, "the other VM's interrupt is not counted");
        }
        Assert.That((io.IsDisposed, second.IsDisposed), Is.EqualTo((true, true)));
    }

    private static PciHost Add(TestVm machine, FakeVfioIo io)
    {
        IDeviceServices? services = null;
        machine.Vm.AddDevice(s => new VfioPciDevice(DeviceOptions.Parse("vfio"), io, services = s));
        return services!.Pci;
    }
}
