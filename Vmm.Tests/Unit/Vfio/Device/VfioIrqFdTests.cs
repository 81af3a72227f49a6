using Vmm.Core.Interop;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

/// <summary>The guest reaches unmasked vectors, and BAR pages that hold no MSI-X structures, without this process.</summary>
[TestFixture]
public sealed class VfioIrqFdTests
{
    private const ulong Bar0 = VfioDeviceFixture.Bar0, Bar2 = VfioDeviceFixture.Bar2;

    private FakeAccelerator _accelerator = null!;

    [Test]
    public void AnOpenVectorIsAnIrqFdAndAMaskedOneCollectsHereAsPending()
    {
        using VfioDeviceFixture f = Fixture();
        f.Vector(1, 0xfee00000, 0x41);
        f.Vector(2, 0xfee00000, 0x42, masked: true);
        f.Write(0x72, 2, 0x8000);
        Assert.That(_accelerator.Messages, Is.EqualTo((MsiMessage[])[new(0xfee00000, 0x41)]));
        f.Vector(1, 0xfee00000, 0x41, masked: true);
        f.Vector(1, 0xfee00000, 0x51);
        Assert.That(_accelerator.Messages, Is.EqualTo((MsiMessage[])[new(0xfee00000, 0x51)]), "the route follows the new message");
        f.Io.Fire(VfioPciIrq.Msix, 1);
        Assert.That((IsReadable(f, 1), f.Interrupts.Msi.Count), Is.EqualTo((true, 0)), "only the accelerator reads the eventfd");

        f.Vector(1, 0xfee00000, 0x51, masked: true);
        Assert.That(_accelerator.Messages, Is.Empty);
        LeakCheck.WaitFor(() => f.MmioRead(Bar2 + 0x1800) == 2, "the pending bit is not set");
        f.Vector(1, 0xfee00000, 0x61);
        Assert.That(f.Messages(1), Is.EqualTo(((ulong, uint)[])[(0xfee00000, 0x61)]), "unmasking sends the pending message once");
        Assert.That(_accelerator.Messages, Is.EqualTo((MsiMessage[])[new(0xfee00000, 0x61)]));
    }

    [Test]
    public void WithoutTheBusOrUnderTheFunctionsMaskNoVectorIsAnIrqFd()
    {
        using VfioDeviceFixture f = Fixture();
        f.Vector(0, 0xfee00000, 0x40);
        f.Vector(3, 0xfee00000, 0x43);
        f.Write(0x72, 2, 0x8000);
        Assert.That(_accelerator.Messages, Has.Count.EqualTo(2));
        f.Write(0x72, 2, 0xc000);
        Assert.That(_accelerator.Messages, Is.Empty);
        f.Write(0x72, 2, 0x8000);
        f.Write(4, 2, 3);
        Assert.That(_accelerator.Messages, Is.Empty);
        f.Write(4, 2, 7);
        Assert.That(_accelerator.Messages, Has.Count.EqualTo(2));
        f.Write(0x72, 2, 0);
        Assert.That((_accelerator.Messages, _accelerator.Routes), Is.EqualTo((Array.Empty<MsiMessage>(), 0)));
    }

    /// <summary>Page 1 of BAR 2 holds the table and the pending bits. The VMM emulates them even where the device allows mapping them.</summary>
    [TestCase(false), TestCase(true)]
    public void PagesWithMsixStructuresAreTrapped(bool mappable)
    {
        using VfioDeviceFixture f = Fixture(mappable);
        f.Write(0x72, 2, 0x8000);
        Assert.That(_accelerator.Ranges.Order(), Is.EqualTo(((ulong, ulong)[])[(Bar0, 4096), (Bar2, 4096), (Bar2 + 0x2000, 0x2000)]));
        f.Write(0x10, 4, 0xfd000000);
        Assert.That(_accelerator.Slots, Does.Contain(0xfd000000ul).And.Not.Contain(Bar0), "the mappings follow the BAR");
        f.Write(4, 2, 5);
        Assert.That(_accelerator.Slots, Is.Empty, "memory decoding is off");
    }

    private VfioDeviceFixture Fixture(bool mappable = false)
    {
        _accelerator = new FakeAccelerator();
        FakeVfioIo io = new FakeVfioIo().Bar(0, 4096, 0, new VfioRegionArea(0, 4096)).Bar(1, 32, 1).Bar(2, 0x4000, 0xc, new VfioRegionArea(0, 0x4000))
            .Capability(0x70, 0x11, 0, 3, 0, 2, 0x10, 0, 0, 2, 0x18, 0, 0).Irq(VfioPciIrq.Msix, 4);
        if (mappable) io.MsixMappable(2);
        return new VfioDeviceFixture(io, ownedServices: new TestServices { Accelerator = _accelerator }).Mapped();
    }

    private static bool IsReadable(VfioDeviceFixture f, uint vector) => (Posix.Poll(f.Io.Bound(VfioPciIrq.Msix, vector), Posix.POLLIN, null, 0, out _) & Posix.POLLIN) != 0;
}
