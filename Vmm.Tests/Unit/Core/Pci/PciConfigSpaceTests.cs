using Vmm.Core.Pci;

namespace Vmm.Tests.Unit.Core.Pci;

[TestFixture]
public sealed class PciConfigSpaceTests
{
    [Test]
    public void GuestsWriteOnlyWritableBits()
    {
        var config = new PciConfigSpace(isExpress: false);
        config.SetUInt32(0, 0x12345678);
        config.Write(0, 4, 0xffffffff);
        config.Write(PciRegisters.Command, 2, 0xffff);
        Assert.That(config.Read(0, 4), Is.EqualTo(0x12345678));
        Assert.That(config.Command, Is.EqualTo(PciCommand.Io | PciCommand.Memory | PciCommand.Master | PciCommand.SystemError | PciCommand.IntxDisable));
    }

    [Test]
    public void StatusErrorsAreClearedByWritingOne()
    {
        var config = new PciConfigSpace(isExpress: false);
        config.SetUInt16(PciRegisters.Status, 0xf910);
        config.Write(PciRegisters.Status, 2, 0x8000);
        Assert.That(config.Read(PciRegisters.Status, 2), Is.EqualTo(0x7910));
    }

    [TestCase(1, 0x44u)]
    [TestCase(2, 0x3344u)]
    [TestCase(4, 0x11223344u)]
    public void ReadsHaveTheirWidth(int size, uint expected)
    {
        var config = new PciConfigSpace(isExpress: true);
        config.SetUInt32(0x100, 0x11223344);
        Assert.That(config.Read(0x100, size), Is.EqualTo(expected));
    }

    [Test]
    public void AccessesAtTheEndStayInside()
    {
        var config = new PciConfigSpace(isExpress: false);
        config.Write(255, 4, 0xaabbccdd);
        Assert.That(config.Read(255, 4), Is.EqualTo(0xdd));
    }

    [Test]
    public void CapabilitiesComeInChainOrder()
    {
        var config = new PciConfigSpace(isExpress: false);
        config.AddCapability(PciCapabilityId.PowerManagement, 0x50, 8);
        config.AddCapability(PciCapabilityId.Express, 0x40, 8);
        Assert.That(config.Capabilities(out bool broken), Is.EqualTo(((byte, int)[])[(PciCapabilityId.Express, 0x40), (PciCapabilityId.PowerManagement, 0x50)]));
        Assert.That(broken, Is.False);
        Assert.That(config.FindCapability(PciCapabilityId.PowerManagement), Is.EqualTo(0x50));
        Assert.That(config.FindCapability(PciCapabilityId.Msix), Is.Zero);
    }

    [TestCase(0x40, TestName = "ALoopEndsTheChain")]
    [TestCase(0x10, TestName = "APointerIntoTheHeaderEndsTheChain")]
    public void ABadPointerEndsTheChain(byte next)
    {
        var config = new PciConfigSpace(isExpress: false);
        config.AddCapability(PciCapabilityId.PowerManagement, 0x50, 8);
        config.AddCapability(PciCapabilityId.Express, 0x40, 8);
        config.Bytes[0x51] = next;
        Assert.That(config.Capabilities(out bool broken), Has.Count.EqualTo(2));
        Assert.That(broken, Is.True);
    }

    [Test]
    public void OnlyCheckedBitsThatNoGuestChangesMustAgree()
    {
        var config = new PciConfigSpace(isExpress: false);
        config.AddCapability(PciCapabilityId.PowerManagement, 0x50, 8);
        byte[] other = config.Bytes.ToArray();
        Assert.That(config.FindMismatch(other), Is.EqualTo(-1));
        other[PciRegisters.Command] = 7;
        other[PciRegisters.InterruptLine] = 11;
        other[0x80] = 0x55;
        Assert.That(config.FindMismatch(other), Is.EqualTo(-1));
        other[0x54] = 1;
        Assert.That(config.FindMismatch(other), Is.EqualTo(0x54));
    }
}
