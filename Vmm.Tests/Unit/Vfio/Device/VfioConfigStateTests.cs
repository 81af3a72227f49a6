using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

[TestFixture]
public sealed class VfioConfigStateTests
{
    [TestCase(4096, 4116 + 64 + 1)]
    [TestCase(256, 276 + 64 + 1)]
    public void TheRecordHasConfigLevelsAndMsix(int configBytes, int length)
    {
        using var f = new VfioDeviceFixture(VfioDeviceFixture.Typical(configBytes));
        f.Mapped();
        f.Vector(1, 0xfee00000, 0x41);
        byte[] record = f.Save();
        Assert.That(record, Has.Length.EqualTo(length));
        Assert.That(record[..4], Is.EqualTo((byte[])[0, 0, 0, 2]));
        Assert.That(record[4..(4 + configBytes)], Is.EqualTo(f.Device.Function.Config.Bytes.ToArray()));
        Assert.That(record[(4 + configBytes)..(20 + configBytes)], Is.All.Zero);
        Assert.That(record[(20 + configBytes)..], Is.EqualTo(SectionBytes.Hex(
            "0000000000000000 00000000 01000000" + "0000e0fe00000000 41000000 00000000" + "0000000000000000 00000000 01000000" + "0000000000000000 00000000 01000000" + "00")));
    }

    /// <summary>The record of a 256-byte device without MSI-X, with every byte written by hand from vfio-migration 6.</summary>
    [Test]
    public void AHandMadeRecord()
    {
        using var f = new VfioDeviceFixture(new FakeVfioIo(256).Bar(0, 4096, 0).Capability(0x50, 0x05, 0, 0x80, 0));
        f.Write(0x10, 4, 0xfe000000);
        f.Write(0x3c, 1, 11);
        f.Write(4, 2, 6);
        f.Write(0x54, 4, 0xfee01000);
        f.Write(0x5c, 2, 0x0031);
        f.Write(0x52, 2, 1);
        string expected = "00000002"
            + "f41a0100 06001000 10020007 00000000" + "000000fe 00000000 00000000 00000000" + "00000000 00000000 00000000 f41a0200" + "00000000 50000000 00000000 0b010000"
            + Zeros(16) + "05008100 0010e0fe 00000000 31000000" + Zeros(160)
            + "00000000 00000000 00000000 00000000";
        Assert.That(f.Save(), Is.EqualTo(SectionBytes.Hex(expected)));
        Assert.That(f.Save(), Has.Length.EqualTo(276));

        static string Zeros(int bytes) => new('0', 2 * bytes);
    }

    [Test]
    public void TheDestinationTakesOverWhatTheGuestHadSet()
    {
        using var source = new VfioDeviceFixture();
        source.Mapped();
        source.Write(0x3c, 1, 11);
        source.Vector(1, 0xfee00000, 0x41);
        source.Vector(3, 0xfee00000, 0x43);
        source.Write(0x72, 2, 0x8000);
        source.Vector(3, 0xfee00000, 0x43, masked: true);
        source.Io.Fire(VfioPciIrq.Msix, 3);
        LeakCheck.WaitFor(() => source.MmioRead(VfioDeviceFixture.Bar2 + 0x1800) == 8, "the pending bit is not set");
        byte[] record = source.Save();

        using var target = new VfioDeviceFixture();
        target.Load(record);
        Assert.That(target.Save(), Is.EqualTo(record));
        Assert.That(target.Io.WriteLog, Is.EqualTo((string[])["7+04=0007"]), "BARs are emulated, so only the command goes to the device");
        Assert.That(target.Io.BusMaster, Is.EqualTo((bool[])[true]));
        Assert.That(target.Io.IrqLog, Is.EqualTo((string[])["0 disable", "2 bind 0+2 -f"]));
        Assert.That(target.Device.Function.Bar(0)!.Address, Is.EqualTo(VfioDeviceFixture.Bar0));
        target.Io.Fire(VfioPciIrq.Msix, 1);
        Assert.That(target.Messages(1), Is.EqualTo(((ulong, uint)[])[(0xfee00000, 0x41)]));
        target.Vector(3, 0xfee00000, 0x43);
        Assert.That(target.Messages(2)[1], Is.EqualTo((0xfee00000UL, 0x43u)), "the vector was pending when the device moved");
    }

    [Test]
    public void MsiIsEnabledAgain()
    {
        using var source = new VfioDeviceFixture();
        source.Mapped();
        source.Write(0x52, 2, 0x21);
        using var target = new VfioDeviceFixture();
        target.Load(source.Save());
        Assert.That(target.Io.IrqLog, Is.EqualTo((string[])["0 disable", "1 bind 0+4 ffff"]));
    }

    [Test]
    public void MsixWithoutVectorsIsEnabledAgain()
    {
        using var source = new VfioDeviceFixture();
        source.Mapped();
        source.Write(0x72, 2, 0xc000);
        using var target = new VfioDeviceFixture();
        target.Load(source.Save());
        Assert.That(target.Io.IrqLog, Is.EqualTo((string[])["0 disable", "2 bind 0+1 -"]));
    }

    [Test]
    public void ALineThatMovedAssertedIsServedByTheNextAccess()
    {
        using var source = new VfioDeviceFixture();
        source.Mapped();
        source.Io.Fire(VfioPciIrq.Intx);
        source.Interrupts.WaitFor(static i => i.Levels[1], "INTx");
        byte[] record = source.Save(), bus = SectionBytes.Save(PciHost.BusState, source.Services.Pci);
        Assert.That(record[4100..4116], Is.EqualTo((byte[])[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));

        using var target = new VfioDeviceFixture();
        SectionBytes.Load(PciHost.BusState, target.Services.Pci, bus);
        target.Load(record);
        Assert.That(target.Interrupts.Levels[1], Is.True);
        target.Io.IrqLog.Clear();
        target.MmioRead(VfioDeviceFixture.Bar0);
        Assert.That(target.Interrupts.Levels[1], Is.False);
        Assert.That(target.Io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1"]));
    }

    [Test]
    public void LoadingLeavesNothingOfTheStateBefore()
    {
        using var f = new VfioDeviceFixture();
        byte[] fresh = f.Save();
        f.Mapped();
        f.Vector(1, 0xfee00000, 0x41);
        f.Write(0x72, 2, 0x8000);
        f.Io.IrqLog.Clear();
        f.Load(fresh);
        Assert.That(f.Save(), Is.EqualTo(fresh));
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 disable", "0 bind 0+1 f"]));
        Assert.That(f.Io.BusMaster, Is.EqualTo((bool[])[true, false]));
        Assert.That(f.Device.Function.Bar(0)!.Address, Is.Null);
    }

    [Test]
    public void ADifferentDeviceIsRefusedWithTheOffset()
    {
        using var source = new VfioDeviceFixture(VfioDeviceFixture.Typical().Set(2, 2, 0x0003));
        using var target = new VfioDeviceFixture();
        byte[] before = target.Save();
        var error = Assert.Throws<IncompatibleStateException>(() => target.Load(source.Save()));
        Assert.That(error!.Message, Does.Contain("offset 0x02").And.Contain("0000:00:01.0/vfio"));
        Assert.That(target.Save(), Is.EqualTo(before));
    }

    [Test]
    public void ACheckReadsTheRecordAndChangesNothing()
    {
        using var source = new VfioDeviceFixture();
        source.Mapped();
        source.Write(0x72, 2, 0x8000);
        using var target = new VfioDeviceFixture();
        byte[] before = target.Save(), record = source.Save();
        target.Load(record, apply: false);
        Assert.That(target.Save(), Is.EqualTo(before));
        Assert.That((target.Io.WriteLog.Count, target.Io.IrqLog.Count), Is.EqualTo((0, 0)));
        record[4] ^= 1;
        Assert.That(Assert.Throws<IncompatibleStateException>(() => target.Load(record, apply: false))!.Message, Does.Contain("VFIOPCIDevice").And.Contain("offset 0x00"));
    }

    /// <summary>
    /// The guest has put the device into D3 since the old process opened it. The next process reads D3 when it opens the device, but the old one's
    /// shadow still has D0.
    /// </summary>
    [Test]
    public void TheNextProcessTakesWhatIsNotEmulatedFromTheDevice()
    {
        using var old = new VfioDeviceFixture();
        old.Mapped();
        byte[] opened = old.Save();
        old.Write(0x44, 2, 3);
        using var next = new VfioDeviceFixture(VfioDeviceFixture.Typical().Set(4, 2, 7).Set(0x44, 2, 3));
        next.LoadCpr(old.SaveCpr());
        Assert.That(next.Read(0x44, 2), Is.EqualTo(3));
        next.Io.Set(0x44, 2, 1);
        Assert.That(next.Read(0x44, 2), Is.EqualTo(1));
        Assert.That(next.Read(0x10), Is.EqualTo(VfioDeviceFixture.Bar0));
        Assert.That(next.Save(), Is.EqualTo(opened), "the record equals that of a device just opened, so a destination accepts it");
        using var host = new VfioDeviceFixture();
        Assert.DoesNotThrow(() => host.Load(next.Save()));
    }

    [Test]
    public void TheNextProcessChecksWhatIsEmulatedAndLaterEverything()
    {
        using var old = new VfioDeviceFixture();
        using var next = new VfioDeviceFixture();
        byte[] record = old.SaveCpr(), other = [.. record];
        other[4 + 0x72] ^= 1;
        Assert.That(Assert.Throws<IncompatibleStateException>(() => next.LoadCpr(other))!.Message, Does.Contain("offset 0x72"));
        next.LoadCpr(record);
        byte[] foreign = next.Save();
        foreign[4 + 0x44] ^= 1;
        Assert.That(Assert.Throws<IncompatibleStateException>(() => next.Load(foreign))!.Message, Does.Contain("offset 0x44"));
    }

    [Test]
    public void VendorSpecificBodiesAreCheckedOnlyOnDemand([Values] bool check)
    {
        using var source = new VfioDeviceFixture(VfioDeviceFixture.Typical().Set(0x83, 1, 0x77));
        using var target = new VfioDeviceFixture(options: check ? ",skip-vsc-check=off" : "");
        if (check) Assert.That(Assert.Throws<IncompatibleStateException>(() => target.Load(source.Save()))!.Message, Does.Contain("offset 0x83"));
        else Assert.DoesNotThrow(() => target.Load(source.Save()));
    }

    [Test]
    public void EveryProperPrefixFails()
    {
        using var source = new VfioDeviceFixture(VfioDeviceFixture.Typical(256));
        byte[] record = source.Save();
        using var target = new VfioDeviceFixture(VfioDeviceFixture.Typical(256));
        for (int n = 0; n < record.Length; n += n is > 8 and < 270 ? 31 : 1)
        {
            var f = new Vmm.Core.Wire.QemuFileReader(new MemoryChannel(record[..n]));
            Assert.Throws<StreamTruncatedException>(() => target.Locked(d => d.LoadConfig(f, apply: n % 2 == 0)), $"{n} bytes");
        }
        target.Load(record);
    }

    [Test]
    public void TheShadowFollowsTheDeviceWhereNothingIsChecked()
    {
        using var f = new VfioDeviceFixture();
        byte[] before = f.Save();
        f.Io.Set(0xc0, 4, 0xfeedface).Set(0x84, 1, 0x99).Set(0x44, 2, 0x0003).Set(4, 2, 7);
        f.Locked(static d => d.ReadShadow());
        byte[] after = f.Save();
        Assert.That(after[(4 + 0xc0)..(4 + 0xc4)], Is.EqualTo(SectionBytes.Hex("cefaedfe")));
        Assert.That(after[4 + 0x84], Is.EqualTo(0x99));
        Assert.That(after[4 + 0x44], Is.EqualTo(before[4 + 0x44]), "a changed byte here would make a destination refuse the record");
        Assert.That(after[(4 + 4)..(4 + 6)], Is.EqualTo(before[(4 + 4)..(4 + 6)]), "the record keeps the guest's command register");
        using var target = new VfioDeviceFixture();
        Assert.DoesNotThrow(() => target.Load(after));
    }

    [Test]
    public void SavingDoesNotTouchTheDevice()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Io.Answer = Errno.EINVAL;
        int reads = f.Io.RegionReads;
        f.Save();
        Assert.That((f.Io.RegionReads, f.Io.WriteLog.Count, f.Io.IrqLog.Count), Is.EqualTo((reads, 0, 0)));
    }

    [Test]
    public void ResetIsPowerOn()
    {
        using var f = new VfioDeviceFixture();
        byte[] fresh = f.Save();
        f.Mapped();
        f.Write(0xc0, 4, 0x12345678);
        f.Write(0x44, 2, 3);
        f.Vector(1, 0xfee00000, 0x41);
        f.Write(0x72, 2, 0x8000);
        f.Io.WriteLog.Clear();
        f.Io.IrqLog.Clear();
        f.Locked(static d => d.Reset());
        Assert.That(f.Save(), Is.EqualTo(fresh));
        Assert.That(f.Io.Resets, Is.EqualTo(1));
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 disable", "0 bind 0+1 f"]));
        Assert.That(f.Io.WriteLog, Is.EqualTo((string[])["7+44=0000", "7+04=0000", "7+10=00000000", "7+14=00000000", "7+18=00000000", "7+1c=00000000", "7+20=00000000", "7+24=00000000"]));
        Assert.That(f.Io.BusMaster[^1], Is.False);
    }

    [TestCase(true)]
    [TestCase(false)]
    public void WhatTheGuestHadSetIsToldToADeviceThatWasReset(bool msix)
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        if (msix) f.Vector(1, 0xfee00000, 0x41);
        if (msix) f.Write(0x72, 2, 0x8000);
        f.Io.WriteLog.Clear();
        f.Io.IrqLog.Clear();
        byte[] before = f.Save();
        f.Locked(static d => d.ReapplyAfterReset());
        Assert.That(f.Save(), Is.EqualTo(before));
        Assert.That(f.Io.WriteLog, Is.EqualTo(msix ? (string[])["7+04=0007", "7+72=8003"] : ["7+04=0007"]));
        Assert.That(f.Io.IrqLog, Is.EqualTo(msix ? (string[])["2 bind 0+2 -f"] : ["0 bind 0+1 f"]));
    }

    [Test]
    [NonParallelizable]
    public void EveryDescriptorIsClosed()
    {
        Use();
        List<string> before = LeakCheck.SettledDescriptors();
        for (int i = 0; i < 5; i++) Use();
        LeakCheck.NoMoreThan(before);

        static void Use()
        {
            using var f = new VfioDeviceFixture(VfioDeviceFixture.Typical().Bar(0, 0x1000, 0, new VfioRegionArea(0, 0x1000)));
            f.Mapped();
            f.Vector(0, 1, 1);
            f.Write(0x72, 2, 0x8000);
            f.Vector(3, 1, 1);
            byte[] record = f.Save();
            f.Write(0x72, 2, 0);
            f.Write(0x52, 2, 0x21);
            f.Load(record);
            f.Locked(static d => d.Reset());
        }
    }
}
