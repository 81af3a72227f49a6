using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>A VFIO device's INTx pin and its BAR in a guest that really runs.</summary>
[NonParallelizable]
internal sealed class KvmPinTests
{
    private const ulong Bar0 = 0xd0000000;

    [Test]
    public void The_pin_reaches_the_guest_and_its_acknowledgement_the_device_without_this_process()
    {
        using KvmGuest guest = Waiting(out FakeVfioIo io, out VfioPciDevice device);
        guest.Vm.Cont();
        // Fire only once the guest waits: when a guest unmasks a pending level, KVM asks the device to signal it again, and this fake does not.
        KvmGuest.WaitFor(() => Found(guest).Rounds == 1, "the guest waits");
        io.Fire(VfioPciIrq.Intx);
        KvmGuest.WaitFor(() => Found(guest).Pins > 0 && IsReadable(io.UnmaskFd!), "the pin and its acknowledgement");
        Assert.That((device.Function.IsIntxAsserted, guest.Kvm.Vm.Slots.Count), Is.EqualTo((false, 2)), "KVM took the interrupt, and the BAR is a memory slot");
    }

    [Test]
    public void A_level_that_is_up_when_the_VM_stops_is_ours_and_goes_on_when_it_starts()
    {
        using KvmGuest guest = Waiting(out FakeVfioIo io, out VfioPciDevice device);
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => Found(guest).Rounds == 1, "the guest waits");
        guest.Vm.Stop();
        io.Fire(VfioPciIrq.Intx);
        KvmGuest.WaitFor(() => device.Function.IsIntxAsserted, "the level");
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => Found(guest).Pins > 0 && IsReadable(io.UnmaskFd!), "the pin and its acknowledgement");
        Assert.That(device.Function.IsIntxAsserted, Is.False);
    }

    [Test]
    public void A_disabled_pin_does_not_reach_the_guest_before_it_is_enabled()
    {
        using KvmGuest guest = Waiting(out FakeVfioIo io, out VfioPciDevice device);
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => Found(guest).Rounds == 1, "the guest waits");
        Config(guest, device, 4, 0x402);
        io.Fire(VfioPciIrq.Intx);
        KvmGuest.WaitFor(() => device.Function.IsIntxAsserted, "the level");
        Assert.That((Found(guest).Pins, guest.Kvm.Vm.Slots.Count), Is.EqualTo((0ul, 2)));
        Config(guest, device, 4, 2);
        KvmGuest.WaitFor(() => Found(guest).Pins > 0, "the pin");
    }

    [Test]
    public void Without_an_irqfd_the_BAR_is_trapped()
    {
        using KvmGuest guest = Waiting(out FakeVfioIo io, out VfioPciDevice device, ",x-no-kvm-intx=on");
        guest.Vm.Cont();
        io.Fire(VfioPciIrq.Intx);
        KvmGuest.WaitFor(() => Found(guest).Pins > 0, "the pin");
        Assert.That((device.Function.IsIntxAsserted, guest.Kvm.Vm.Slots.Count), Is.EqualTo((true, 1)));
    }

    private static KvmGuest Waiting(out FakeVfioIo io, out VfioPciDevice device, string options = "")
    {
        var guest = new KvmGuest(DevCheckGuest.BuildWaiting());
        FakeVfioIo fake = io = new FakeVfioIo().Bar(0, 4096, 0, new VfioRegionArea(0, 4096));
        VfioPciDevice? made = null;
        guest.Vm.AddDevice(s => made = new VfioPciDevice(DeviceOptions.Parse("vfio" + options), fake, s));
        device = made!;
        Config(guest, device, 0x10, unchecked((uint)Bar0));
        Config(guest, device, 4, 2);
        return guest;
    }

    private static void Config(KvmGuest guest, VfioPciDevice device, int register, uint value)
    {
        using (guest.Vm.Bql.Acquire()) device.Function.ConfigWrite(register, register == 4 ? 2 : 4, value);
    }

    private static DevCheckGuest.Found Found(KvmGuest guest) => DevCheckGuest.Read(guest.Vm.Memory);

    private static bool IsReadable(OwnedFd fd) => (Posix.Poll(fd, Posix.POLLIN, null, 0, out _) & Posix.POLLIN) != 0;
}
