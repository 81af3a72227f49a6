using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

[TestFixture]
public sealed class VfioIrqTests
{
    [Test]
    public void IntxAndNotifiersAreBoundAtRealize()
    {
        using var services = new TestServices();
        FakeVfioIo io = VfioDeviceFixture.Typical();
        VfioPciDevice device;
        using (services.Bql.Acquire()) device = new VfioPciDevice(DeviceOptions.Parse("vfio"), io, services);
        Assert.That(io.IrqLog, Is.EqualTo((string[])["0 bind 0+1 f", "3 bind 0+1 f", "4 bind 0+1 f"]));
        io.IrqLog.Clear();
        device.Dispose();
        Assert.That(io.IrqLog, Is.EqualTo((string[])["4 bind 0+1 -", "3 bind 0+1 -", "0 disable"]));
        Assert.That(io.IsDisposed, Is.True);
    }

    [Test]
    public void WithoutAPinThereIsNoIntx()
    {
        using var services = new TestServices();
        FakeVfioIo io = VfioDeviceFixture.Typical().Set(0x3d, 1, 0).Irq(VfioPciIrq.Err, 0).Irq(VfioPciIrq.Req, 0);
        using (services.Bql.Acquire()) new VfioPciDevice(DeviceOptions.Parse("vfio"), io, services).Dispose();
        Assert.That(io.IrqLog, Is.Empty);
    }

    [Test]
    public void IntxIsALevelThatTheNextAccessLowers()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Io.Fire(VfioPciIrq.Intx);
        f.Interrupts.WaitFor(static i => i.Levels[1], "INTx");
        Assert.That(f.Io.IrqLog, Is.Empty, "the device has masked the interrupt itself");
        f.Io.IrqLog.Clear();
        f.MmioRead(VfioDeviceFixture.Bar0);
        Assert.That(f.Interrupts.Levels[1], Is.False);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1"]));
        f.MmioRead(VfioDeviceFixture.Bar0);
        Assert.That(f.Io.IrqLog, Has.Count.EqualTo(1), "once");
        f.Io.Fire(VfioPciIrq.Intx);
        f.Interrupts.WaitFor(static i => i.Levels[1], "INTx again");
        f.MmioWrite(VfioDeviceFixture.Bar0, 4, 0);
        Assert.That(f.Io.IrqLog, Has.Count.EqualTo(2));
        f.Locked(static d => d.IntxEoi());
        Assert.That(f.Io.IrqLog, Has.Count.EqualTo(2));
    }

    [Test]
    public void MsiReplacesIntxAndIntxComesBack()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Write(0x54, 4, 0xfee00000);
        f.Write(0x5c, 2, 0x40);
        f.Write(0x52, 2, 0x11);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 disable", "1 bind 0+2 ff"]));
        f.Io.Fire(VfioPciIrq.Msi, 1);
        Assert.That(f.Messages(1), Is.EqualTo(((ulong, uint)[])[(0xfee00000, 0x41)]));
        f.Io.IrqLog.Clear();
        f.Write(0x52, 2, 0x10);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["1 disable", "0 bind 0+1 f"]));
    }

    [Test]
    public void MsiThatIsRefusedLeavesNoInterruptsUntilTheDriverFallsBack()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Io.IrqAnswer = Errno.ENOSPC;
        f.Write(0x52, 2, 0x01);
        f.Io.IrqAnswer = Errno.None;
        f.Io.IrqLog.Clear();
        f.Write(0x52, 2, 0x00);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 bind 0+1 f"]));
    }

    [Test]
    public void MsixBindsOnlyWhatIsUsed()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Vector(0, 0x1000, 10, masked: true);
        f.Vector(2, 0x3000, 12);
        f.Write(0x72, 2, 0x8000);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 disable", "2 bind 0+3 --f"]));
        f.Io.Fire(VfioPciIrq.Msix, 2);
        Assert.That(f.Messages(1), Is.EqualTo(((ulong, uint)[])[(0x3000, 12)]));
        f.Io.IrqLog.Clear();
        f.Vector(0, 0x1000, 11);
        f.Vector(3, 0x4000, 13);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 bind 0+1 f", "2 bind 3+1 f"]));
        f.Io.IrqLog.Clear();
        f.Write(0x72, 2, 0);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 disable", "0 bind 0+1 f"]));
    }

    [Test]
    public void MsixWithoutVectorsStillTurnsTheDeviceOn()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Write(0x72, 2, 0xc000);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 disable", "2 bind 0+1 -"]));
        f.Io.IrqLog.Clear();
        for (int v = 0; v < 4; v++) f.Vector(v, 0x1000, (uint)v);
        Assert.That(f.Io.IrqLog, Is.Empty, "the function mask masks all vectors");
        f.Write(0x72, 2, 0x8000);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 bind 0+4 ffff"]), "one request binds all vectors");
    }

    [Test]
    public void ADeviceThatCannotGrowIsDisabledFirst()
    {
        using var f = new VfioDeviceFixture(VfioDeviceFixture.Typical().Irq(VfioPciIrq.Msix, 4, VfioIrqInfoFlags.EventFd | VfioIrqInfoFlags.NoResize));
        f.Mapped();
        f.Vector(0, 0x1000, 10);
        f.Write(0x72, 2, 0x8000);
        f.Io.IrqLog.Clear();
        f.Vector(2, 0x3000, 12);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 disable", "2 bind 0+3 f-f"]));
    }

    [Test]
    public void AMaskedVectorBecomesPendingAndFiresWhenUnmasked()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        f.Vector(1, 0x2000, 11);
        f.Write(0x72, 2, 0x8000);
        f.Vector(1, 0x2000, 11, masked: true);
        f.Io.IrqLog.Clear();
        f.Io.Fire(VfioPciIrq.Msix, 1);
        LeakCheck.WaitFor(() => f.MmioRead(VfioDeviceFixture.Bar2 + 0x1800) == 2, "the pending bit is not set");
        Assert.That(f.Interrupts.Msi, Is.Empty);
        Assert.That(f.Io.IrqLog, Is.Empty, "masking sends the device no request");
        f.Vector(1, 0x2000, 99);
        Assert.That(f.Messages(1), Is.EqualTo(((ulong, uint)[])[(0x2000, 99)]));
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["2 bind 1+1 f"]));
    }

    [Test]
    public void AnErrorStopsTheVm()
    {
        using var f = new VfioDeviceFixture();
        using (f.Services.Bql.Acquire()) f.Services.Notifier.Start();
        f.Io.Fire(VfioPciIrq.Req);
        f.Io.Fire(VfioPciIrq.Err);
        LeakCheck.WaitFor(() => f.Services.RunState.State == RunState.InternalError, "the VM did not stop");
    }

    [Test]
    public void HoldingTheBqlDelaysInterruptsAndDeadlocksNothing()
    {
        using var f = new VfioDeviceFixture();
        f.Mapped();
        using (f.Services.Bql.Acquire())
        {
            f.Io.Fire(VfioPciIrq.Intx);
            f.Write(0x52, 2, 0x01);
            f.Write(0x52, 2, 0x00);
            f.Io.Fire(VfioPciIrq.Intx);
            Assert.That(f.Interrupts.Levels[1], Is.False);
        }
        f.Interrupts.WaitFor(static i => i.Levels[1], "INTx of the eventfd that is bound now");
        using (f.Services.Bql.Acquire())
        {
            f.Io.Fire(VfioPciIrq.Intx);
            f.Device.Dispose();
        }
        Assert.That(f.Interrupts.Levels[1], Is.False);
    }

    [Test]
    public void TwoDevicesShareAThreadAndNothingElse()
    {
        using var services = new TestServices();
        using var a = new VfioDeviceFixture(options: ",id=a", services: services);
        using var b = new VfioDeviceFixture(options: ",id=b", services: services);
        b.Mapped();
        Assert.That(a.Read(0x10), Is.Zero);
        a.Io.Fire(VfioPciIrq.Intx);
        services.Interrupts.WaitFor(static i => i.Levels[1], "INTx of slot 1");
        b.MmioRead(VfioDeviceFixture.Bar0);
        Assert.That(services.Interrupts.Levels, Is.EqualTo((bool[])[false, true, false, false]), "an access to another device does not lower the level");
        b.Io.Fire(VfioPciIrq.Intx);
        services.Interrupts.WaitFor(static i => i.Levels[2], "INTx of slot 2");
        Assert.That((a.Device.Path, b.Device.Path), Is.EqualTo(("0000:00:01.0", "0000:00:02.0")));
    }
}
