using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Pci;

[TestFixture]
public sealed class PciInterruptTests
{
    private const ulong Bar = 0x1_0000_0000, Table = Bar + 0x1000, Pba = Bar + 0x1800;

    private TestServices _services = null!;
    private FakePciDevice _device = null!;

    [SetUp]
    public void SetUp()
    {
        _services = new TestServices();
        using (_services.Bql.Acquire()) _device = new FakePciDevice(_services.Pci);
        Config(0x18, 4, unchecked((uint)Bar));
        Config(0x1c, 4, (uint)(Bar >> 32));
        Config(4, 2, 6);
    }

    [TearDown]
    public void TearDown()
    {
        _device.Dispose();
        _services.Dispose();
    }

    private void Config(int offset, int size, uint value) => _services.Pci.ConfigWrite(_device.Address.DevFn, offset, size, value);

    private void Program(int vector, ulong address, uint data, uint control)
    {
        _services.Pci.MmioWrite(new GuestAddress(Table + 16 * (ulong)vector), 8, address);
        _services.Pci.MmioWrite(new GuestAddress(Table + 16 * (ulong)vector + 8), 4, data);
        _services.Pci.MmioWrite(new GuestAddress(Table + 16 * (ulong)vector + 12), 4, control);
    }

    private (ulong, uint)[] Sent => [.. _services.Interrupts.Msi.Select(static m => (m.Message.Address, m.Message.Data))];

    [Test]
    public void MsixSendsUnmaskedVectors()
    {
        Program(1, 0xfee0_1000, 0x41, 0);
        Config(0x62, 2, 0x8000);
        _device.Msix!.Notify(1);
        Assert.That(Sent, Is.EqualTo(((ulong, uint)[])[(0xfee01000, 0x41)]));
        Assert.That(_services.Interrupts.Msi.Single().RequesterId, Is.EqualTo(0x08));
    }

    [Test]
    public void AMaskedMsixVectorBecomesPendingAndFiresWhenUnmasked()
    {
        Program(2, 0xfee0_0000, 0x42, 1);
        Config(0x62, 2, 0x8000);
        _device.Msix!.Notify(2);
        Assert.That(Sent, Is.Empty);
        Assert.That(_services.Pci.MmioRead(new GuestAddress(Pba), 4), Is.EqualTo(4));
        Program(2, 0xfee0_0000, 0x43, 0);
        Assert.That(Sent, Is.EqualTo(((ulong, uint)[])[(0xfee00000, 0x43)]));
        Assert.That(_services.Pci.MmioRead(new GuestAddress(Pba), 8), Is.Zero);
    }

    [Test]
    public void TheFunctionMaskHoldsAllVectors()
    {
        Program(0, 1, 10, 0);
        Program(3, 4, 13, 0);
        Config(0x62, 2, 0xc000);
        _device.Msix!.Notify(3);
        _device.Msix.Notify(0);
        Assert.That(Sent, Is.Empty);
        Config(0x62, 2, 0x8000);
        Assert.That(Sent, Is.EqualTo(((ulong, uint)[])[(1, 10), (4, 13)]));
    }

    [Test]
    public void MsixStructuresNeverReachTheDevice()
    {
        Program(0, 0x1122334455667788, 0x99aabbcc, 1);
        Assert.That(_services.Pci.MmioRead(new GuestAddress(Table + 4), 8), Is.EqualTo(0x99aabbcc11223344));
        _services.Pci.MmioWrite(new GuestAddress(Table), 1, 0);
        _services.Pci.MmioWrite(new GuestAddress(Pba), 4, 0xff);
        Assert.That(_services.Pci.MmioRead(new GuestAddress(Table), 1), Is.EqualTo(0x88), "the table ignores narrow writes");
        Assert.That(_services.Pci.MmioRead(new GuestAddress(Pba), 4), Is.Zero);
        Assert.That(_device.Log, Is.Empty);
        _services.Pci.MmioRead(new GuestAddress(Table + 64), 4);
        Assert.That(_device.Log, Is.EqualTo((string[])["r2+1040/4"]));
    }

    [Test]
    public void MsiSendsItsVectorInTheLowDataBits()
    {
        Config(0x44, 4, 0xfee00000);
        Config(0x48, 4, 0x1);
        Config(0x4c, 2, 0x4fff);
        Config(0x42, 2, 0x21);
        _device.Msi!.Notify(3);
        Assert.That(_device.Msi.Vectors, Is.EqualTo(4));
        Assert.That(Sent, Is.EqualTo(((ulong, uint)[])[(0x1_fee0_0000, 0x4fff)]));
        _device.Msi.Notify(4);
        Assert.That(Sent, Has.Length.EqualTo(1), "the guest has not allocated this vector");
    }

    [Test]
    public void AMaskedMsiVectorBecomesPendingAndFiresWhenUnmasked()
    {
        Config(0x4c, 2, 0x40);
        Config(0x50, 4, 2);
        Config(0x42, 2, 0x11);
        _device.Msi!.Notify(1);
        Assert.That(_device.Config.GetUInt32(0x54), Is.EqualTo(2));
        Config(0x50, 4, 0);
        Assert.That(Sent, Is.EqualTo(((ulong, uint)[])[(0, 0x41)]));
        Assert.That(_device.Config.GetUInt32(0x54), Is.Zero);
    }

    [Test]
    public void MoreMsiVectorsThanThereAreAreClamped()
    {
        Config(0x42, 2, 0x71);
        Assert.That(_device.Msi!.Vectors, Is.EqualTo(8));
        Assert.That(_device.Msi.Control & 0x70, Is.EqualTo(0x30));
    }

    [Test]
    public void EnablingMessagesTakesThePinDown([Values(0x42, 0x62)] int control)
    {
        using (_services.Bql.Acquire()) _device.SetIntx(true);
        Config(control, 2, control == 0x42 ? 1u : 0x8000);
        Assert.That(_services.Interrupts.Levels, Is.All.False);
        Assert.That(_device.IsIntxAsserted, Is.False);
    }

    [Test]
    public void AFunctionThatMayNotMasterTheBusSendsNothing()
    {
        Program(0, 1, 10, 0);
        Config(0x62, 2, 0x8000);
        Config(4, 2, 2);
        _device.Msix!.Notify(0);
        Assert.That(Sent, Is.Empty);
    }

    [Test]
    public void VectorsInUseAreAnnounced()
    {
        var notifier = new Notifier();
        Program(1, 0x1000, 5, 0);
        Config(0x62, 2, 0x8000);
        _device.Msix!.SetNotifier(notifier);
        Program(2, 0x2000, 6, 0);
        Program(1, 0x1000, 5, 1);
        Config(0x62, 2, 0xc000);
        Config(0x62, 2, 0x8000);
        Assert.That(notifier.Log, Is.EqualTo((string[])["use 1 5", "use 2 6", "release 1", "release 2", "use 2 6"]));
    }

    [Test]
    public void TheRouterCountsWhatNobodyTakesAndTellsLevelsToWhoComes()
    {
        var router = new InterruptRouter();
        router.SendMsi(new MsiMessage(1, 2), 8);
        router.SetIntx(2, true);
        Assert.That((router.DroppedMsi, router.DroppedIntx), Is.EqualTo((1, 1)));
        var target = new RecordingInterruptController();
        using (router.Attach(target))
        {
            router.SendMsi(new MsiMessage(3, 4), 8);
            Assert.Throws<InvalidOperationException>(() => router.Attach(target));
        }
        router.SendMsi(new MsiMessage(5, 6), 8);
        Assert.That(target.Levels, Is.EqualTo((bool[])[false, false, true, false]));
        Assert.That(target.Msi, Is.EqualTo(((MsiMessage, ushort)[])[(new MsiMessage(3, 4), 8)]));
        Assert.That(router.DroppedMsi, Is.EqualTo(2));
    }

    private sealed class Notifier : IMsixVectorNotifier
    {
        public List<string> Log { get; } = [];

        public void UseVector(int vector, MsiMessage message) => Log.Add($"use {vector} {message.Data}");

        public void ReleaseVector(int vector) => Log.Add($"release {vector}");
    }
}
