using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

[TestFixture]
public sealed class VfioConfigTests
{
    [Test]
    public void TheDevicesRegistersShowThrough()
    {
        using var f = new VfioDeviceFixture();
        Assert.That(f.Read(0), Is.EqualTo(0x00011af4));
        f.Io.Set(0x44, 2, 0x1234);
        Assert.That(f.Read(0x44, 2), Is.EqualTo(0x1234));
        Assert.That(f.Read(0x45, 1), Is.EqualTo(0x12));
    }

    [Test]
    public void BarsAreEmulatedAndSizedByTheirRegions()
    {
        using var f = new VfioDeviceFixture(VfioDeviceFixture.Typical().Bar(4, 0x1800, 0x8));
        f.Io.Set(0x10, 4, 0xdead0000);
        Assert.That(f.Read(0x10), Is.Zero, "the guest does not see the host's addresses");
        for (int n = 0; n < 6; n++) f.Write(0x10 + 4 * n, 4, 0xffffffff);
        Assert.That(Enumerable.Range(0, 6).Select(n => f.Read(0x10 + 4 * n)),
            Is.EqualTo((uint[])[0xfffff000, 0xffffffe1, 0xffffc00c, 0xffffffff, 0xffffe008, 0]), "a region of 0x1800 bytes makes a BAR of 0x2000");
    }

    [Test]
    public void ChainOrderStaysAndMsiIsOurs()
    {
        using var f = new VfioDeviceFixture();
        Assert.That(f.Device.Function.Config.Capabilities(out _).Select(static c => c.Offset), Is.EqualTo((int[])[0x40, 0x50, 0x70, 0x80]));
        int reads = f.Io.RegionReads;
        Assert.That(f.Read(0x50), Is.EqualTo(0x01847005), "the enable bit starts clear");
        Assert.That(f.Read(0x70), Is.EqualTo(0x00038011));
        Assert.That(f.Io.RegionReads, Is.EqualTo(reads), "MSI registers are emulated, so the device is not read");
    }

    [TestCase(0x52, 2, 0x0001u, "7+52=0185")]
    [TestCase(0x52, 1, 0x01u, "7+52=85")]
    [TestCase(0x50, 4, 0x00010000u, "7+50=01850000")]
    public void WhatMsiHasStaysInTheDeviceWhenAGuestWritesZerosThere(int offset, int size, uint written, string forwarded)
    {
        using var f = new VfioDeviceFixture();
        f.Write(offset, size, written);
        Assert.That(f.Io.WriteLog, Does.Contain(forwarded));
    }

    [Test]
    public void TheInterruptLineIsOurs()
    {
        using var f = new VfioDeviceFixture();
        f.Write(0x3c, 1, 11);
        f.Io.Set(0x3c, 1, 5);
        Assert.That(f.Read(0x3c, 1), Is.EqualTo(11));
    }

    [TestCase(",multifunction=on", 0x80u)]
    [TestCase("", 0u)]
    public void TheMultiFunctionBitIsOurs(string options, uint expected)
    {
        using var f = new VfioDeviceFixture(VfioDeviceFixture.Typical().Set(0x0e, 1, expected ^ 0x80), options);
        Assert.That(f.Read(0x0e, 1), Is.EqualTo(expected));
    }

    [Test]
    public void WritesReachTheDevice()
    {
        using var f = new VfioDeviceFixture();
        f.Write(4, 2, 6);
        f.Write(0x3c, 1, 11);
        f.Write(0x10, 4, 0xffffffff);
        Assert.That(f.Io.WriteLog, Is.EqualTo((string[])["7+04=0006", "7+3c=0b", "7+10=ffffffff"]));
        Assert.That(f.Io.BusMaster, Is.EqualTo((bool[])[true]));
        f.Write(4, 2, 2);
        f.Write(4, 2, 3);
        Assert.That(f.Io.BusMaster, Is.EqualTo((bool[])[true, false]));
    }

    [Test]
    public void ALeftoverCommandIsCleared()
    {
        FakeVfioIo io = VfioDeviceFixture.Typical().Set(4, 2, 0x0147);
        using var f = new VfioDeviceFixture(io);
        Assert.That(io.Config[4..6], Is.EqualTo((byte[])[0x40, 0x01]));
        Assert.That(f.Device.Function.IsBusMaster, Is.False);
    }

    [Test]
    public void FailedReadsGiveAllOnesAndFailedWritesAreNoMatter()
    {
        using var f = new VfioDeviceFixture();
        f.Io.Answer = Errno.EIO;
        Assert.That(f.Read(0x44), Is.EqualTo(0xffffffff));
        Assert.That(f.Read(0, 2), Is.EqualTo(0xffff));
        Assert.DoesNotThrow(() => f.Write(4, 2, 7));
        Assert.DoesNotThrow(() => f.Write(0x72, 2, 0x8000));
        Assert.That(f.Read(0x10), Is.Zero, "an emulated register needs no device");
    }

    [Test]
    public void TheRomKeepsItsSizeAndIsReadOnDemand()
    {
        FakeVfioIo io = new(256) { RomBytes = 0x10000 };
        using var f = new VfioDeviceFixture(io);
        f.Write(0x30, 4, 0xffffffff);
        Assert.That(f.Read(0x30), Is.EqualTo(0xffff0001));
        f.Write(0x30, 4, 0xfd000001);
        f.Write(4, 2, 2);
        Assert.That(f.MmioRead(0xfd000010), Is.EqualTo(0x13121110));
        f.Write(0x30, 4, 0xfd000000);
        Assert.That(f.MmioRead(0xfd000010), Is.EqualTo(0xffffffff), "the ROM is disabled");
    }

    [Test]
    public void ASpaceThatEndsEarlyReadsZeroBehindItsEnd()
    {
        FakeVfioIo io = new FakeVfioIo(255).Set(0xfc, 2, 0x2211).Set(0xfe, 1, 0x33);
        using var f = new VfioDeviceFixture(io);
        Assert.That(f.Read(0xfc), Is.EqualTo(0x00332211));
        Assert.That(f.Device.Function.Config.IsExpress, Is.True, "QEMU takes mtty, which has 255 bytes, for an express device");
    }

    [TestCaseSource(nameof(Unfit))]
    public void DevicesThatCannotBeShownAreRefused(FakeVfioIoMaker maker, string why)
    {
        using var services = new TestServices();
        FakeVfioIo io = maker.Make();
        using (services.Bql.Acquire())
        {
            var error = Assert.Catch<VmmException>(() => _ = new VfioPciDevice(DeviceOptions.Parse("vfio"), io, services));
            Assert.That(error!.Message, Does.Contain(why));
        }
        Assert.That(io.IsDisposed, Is.True);
        Assert.That(services.SaveVm.Entries(), Is.Empty);
    }

    private static IEnumerable<TestCaseData> Unfit()
    {
        yield return Case("not a PCI device", static () => new FakeVfioIo { Info = new(true, false, 9, 5) });
        yield return Case("regions", static () => new FakeVfioIo { Info = new(true, true, 7, 5) });
        yield return Case("interrupt indices", static () => new FakeVfioIo { Info = new(true, true, 9, 2) });
        yield return Case("cannot be read", static () => new FakeVfioIo { Answer = Errno.EIO });
        yield return Case("INTx", static () => new FakeVfioIo { IrqAnswer = Errno.EINVAL });
        yield return Case("outside memory BAR 3", static () => new FakeVfioIo().Capability(0x70, 0x11, 0, 3, 0, 3, 0, 0, 0, 3, 8, 0, 0));
        yield return Case("overlap", static () => new FakeVfioIo().Bar(0, 4096, 0).Capability(0x70, 0x11, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0));
        yield return Case("MSI vectors", static () => new FakeVfioIo().Capability(0x50, 0x05, 0, 0x0e, 0));
        yield return Case("room", static () => new FakeVfioIo().Capability(0x50, 0x05, 0, 0x80, 0).Capability(0x54, 0x01, 0));
        yield return Case("taken", static () => new FakeVfioIo().Bar(2, 4096, 4).Bar(3, 4096, 0));
        yield return Case("BAR 0", static () => new FakeVfioIo().Bar(5, 32, 1).HugeBar(0));
        yield return Case("express device type", static () => new FakeVfioIo().Capability(0x60, 0x10, 0, 0x42, 0));

        static TestCaseData Case(string why, Func<FakeVfioIo> make) => new TestCaseData(new FakeVfioIoMaker(make), why).SetArgDisplayNames(why);
    }

    /// <summary>Makes the fake only when its test case runs.</summary>
    public sealed class FakeVfioIoMaker
    {
        private readonly Func<FakeVfioIo> _make;

        internal FakeVfioIoMaker(Func<FakeVfioIo> make) => _make = make;

        internal FakeVfioIo Make() => _make();
    }

    [Test]
    public void ALoopInTheChainEndsIt()
    {
        FakeVfioIo io = new FakeVfioIo().Capability(0x40, 0x01, 0).Capability(0x50, 0x09, 0);
        io.Config[0x51] = 0x40;
        using var f = new VfioDeviceFixture(io);
        Assert.That(f.Device.Function.Config.Capabilities(out bool broken), Has.Count.EqualTo(2));
        Assert.That(broken, Is.False, "the guest sees a chain without a loop");
    }

    [Test]
    public void AddressesInUseAreRefusedAndTheIoIsClosed()
    {
        using var f = new VfioDeviceFixture(options: ",addr=3");
        var io = new FakeVfioIo();
        using (f.Services.Bql.Acquire())
            Assert.Throws<ConfigurationException>(() => _ = new VfioPciDevice(DeviceOptions.Parse("vfio,id=b,addr=3"), io, f.Services));
        Assert.That(io.IsDisposed, Is.True);
    }

    [Test]
    public void ALostDeviceReadsAllOnes()
    {
        using var f = new VfioDeviceFixture().Mapped();
        f.Io.Lose();
        int reads = f.Io.RegionReads;
        Assert.That(f.Device.IsLost, Is.True);
        Assert.That(f.Read(0x10), Is.EqualTo(0xffffffff));
        Assert.That(f.MmioRead(VfioDeviceFixture.Bar0), Is.EqualTo(0xffffffff));
        f.MmioWrite(VfioDeviceFixture.Bar0, 4, 0);
        f.Write(4, 2, 0);
        Assert.DoesNotThrow(() => f.Locked(static d => d.Reset()));
        Assert.That((f.Io.RegionReads, f.Io.WriteLog.Count, f.Io.Resets), Is.EqualTo((reads, 0, 0)));
    }
}
