using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio.Device;

[TestFixture]
public sealed class VfioBarTests
{
    [Test]
    public void WithoutAreasMemoryWritesArePostedAndPortWritesAreNot()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.MmioWrite(VfioDeviceFixture.Bar0 + 8, 4, 0x11223344);
        f.Services.Pci.PioWrite(0xc004, 2, 0xabcd);
        Assert.That(f.Io.WriteLog, Is.EqualTo((string[])["0+08=11223344p", "1+04=abcd"]));
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0 + 8, 2), Is.EqualTo(0x3344));
        Assert.That(f.Services.Pci.PioRead(0xc005, 1), Is.EqualTo(0xab));
    }

    [Test]
    public void AccessesInsideAnAreaGoStraightToIt()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Bar(0, 0x4000, 0, new VfioRegionArea(0x2000, 0x1000), new VfioRegionArea(0, 0x1000));
        using var f = new VfioDeviceFixture(io);
        f.Mapped();
        using MappedRegion view = io.View(0, 0x2000, 0x1000);
        int reads = io.RegionReads;
        f.MmioWrite(VfioDeviceFixture.Bar0 + 0x2010, 8, 0x1122334455667788);
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0 + 0x2014), Is.EqualTo(0x11223344));
        Assert.That(view.Slice(0x10, 8).ToArray(), Is.EqualTo((byte[])[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]));
        Assert.That((io.RegionReads, io.WriteLog.Count), Is.EqualTo((reads, 0)));
        f.MmioWrite(VfioDeviceFixture.Bar0 + 0x1ffe, 4, 0x44332211);
        Assert.That(io.WriteLog, Is.EqualTo((string[])["0+1ffe=44332211"]), "an access half outside the area goes by call, and is not posted, because a posted write has no order with the areas");
    }

    [Test]
    public void XNoMmapMapsNothing()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Bar(0, 0x1000, 0, new VfioRegionArea(0, 0x1000));
        using var f = new VfioDeviceFixture(io, ",x-no-mmap=on");
        Assert.That(io.Mapped, Is.Empty);
        f.Mapped().MmioWrite(VfioDeviceFixture.Bar0, 4, 1);
        Assert.That(io.WriteLog, Is.EqualTo((string[])["0+00=00000001p"]));
    }

    [Test]
    public void PagesOfMsixStructuresAreNotMapped()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Bar(2, 0x4000, 0xc, new VfioRegionArea(0, 0x4000));
        using var f = new VfioDeviceFixture(io);
        Assert.That(io.Mapped, Is.EqualTo(((uint, VfioRegionArea)[])[(2, new(0, 0x1000)), (2, new(0x2000, 0x2000))]));
    }

    [Test]
    public void MsixStructuresInAMappedPageStayOurs()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Bar(2, 0x4000, 0xc, new VfioRegionArea(0, 0x4000)).MsixMappable(2);
        using var f = new VfioDeviceFixture(io);
        f.Mapped();
        Assert.That(io.Mapped, Is.EqualTo(((uint, VfioRegionArea)[])[(2, new(0, 0x4000))]));
        using MappedRegion view = io.View(2, 0, 0x4000);
        view.Slice(0x1000, 0x1000).Fill(0x55);
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar2 + 0x1000, 8), Is.Zero, "the table is emulated");
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar2 + 0x100c), Is.EqualTo(1), "the vector is masked");
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar2 + 0x1800), Is.Zero, "the pending bits are emulated");
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar2 + 0x1040), Is.EqualTo(0x55555555), "the rest of the table's page comes from the device");
        f.Vector(0, 0xfee00000, 1, masked: true);
        Assert.That(view.Slice(0x1000, 4).ToArray(), Is.All.EqualTo(0x55));
    }

    [Test]
    public void ThePartBehindTheRegionReadsAllOnes()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Bar(0, 0x1800, 0);
        using var f = new VfioDeviceFixture(io);
        f.Mapped();
        int reads = io.RegionReads;
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0 + 0x1800), Is.EqualTo(0xffffffff));
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0 + 0x17fe), Is.EqualTo(0xffffffff));
        f.MmioWrite(VfioDeviceFixture.Bar0 + 0x1ffc, 4, 0);
        Assert.That((io.RegionReads, io.WriteLog.Count), Is.EqualTo((reads, 0)));
    }

    [Test]
    public void FailuresGiveAllOnes()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Io.Answer = Errno.EIO;
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0, 8), Is.EqualTo(ulong.MaxValue));
        Assert.DoesNotThrow(() => f.MmioWrite(VfioDeviceFixture.Bar0, 4, 0));
    }

    [Test]
    public void CuttingARangeOutOfAreas()
    {
        List<VfioRegionArea> areas = [new(0x4000, 0x4000), new(0, 0x2000), new(0x2000, 0x1000)];
        VfioBar.Exclude(areas, 0x2010, 0x10);
        VfioBar.Exclude(areas, 0x5ff8, 0x10);
        Assert.That(areas, Is.EqualTo((VfioRegionArea[])[new(0x4000, 0x1000), new(0x7000, 0x1000), new(0, 0x2000)]));
    }
}
