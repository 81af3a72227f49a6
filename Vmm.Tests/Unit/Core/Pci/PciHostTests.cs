using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Pci;

[TestFixture]
public sealed class PciHostTests
{
    private TestServices _services = null!;
    private Lock.Scope Held() => _services.Bql.Acquire();
    private PciHost Host => _services.Pci;

    [SetUp]
    public void SetUp() => _services = new TestServices();

    [TearDown]
    public void TearDown() => _services.Dispose();

    private FakePciDevice Plug(string id = "fake", string? address = null, bool multiFunction = false)
    {
        using (Held()) return new FakePciDevice(Host, id, address, multiFunction);
    }

    private uint ConfigRead(int slot, int register, int size, int lane = 0)
    {
        Host.PioWrite(0xcf8, 4, 0x8000_0000 | (uint)slot << 11 | (uint)register);
        return Host.PioRead((ushort)(0xcfc + lane), size);
    }

    private void ConfigWrite(int slot, int register, int size, uint value, int lane = 0)
    {
        Host.PioWrite(0xcf8, 4, 0x8000_0000 | (uint)slot << 11 | (uint)register);
        Host.PioWrite((ushort)(0xcfc + lane), size, value);
    }

    [Test]
    public void MechanismOneReadsEveryLane()
    {
        using FakePciDevice device = Plug();
        Assert.That(ConfigRead(1, 0, 4), Is.EqualTo(0x12341af4));
        Assert.That(ConfigRead(1, 0, 2), Is.EqualTo(0x1af4));
        Assert.That(ConfigRead(1, 0, 2, lane: 2), Is.EqualTo(0x1234));
        Assert.That(Enumerable.Range(0, 4).Select(lane => ConfigRead(1, 0, 1, lane)), Is.EqualTo((uint[])[0xf4, 0x1a, 0x34, 0x12]));
        Assert.That(Host.PioRead(0xcf8, 4), Is.EqualTo(0x80000800));
        Assert.That(Host.PioRead(0xcf9, 1), Is.EqualTo(0x08));
    }

    [Test]
    public void MechanismOneWritesEveryLane()
    {
        using FakePciDevice device = Plug();
        ConfigWrite(1, 0x3c, 1, 0x0b);
        ConfigWrite(1, 0x04, 2, 7);
        ConfigWrite(1, 0x10, 1, 0xfe, lane: 3);
        Assert.That(ConfigRead(1, 0x3c, 1), Is.EqualTo(0x0b));
        Assert.That(ConfigRead(1, 0x04, 2), Is.EqualTo(7));
        Assert.That(ConfigRead(1, 0x10, 4), Is.EqualTo(0xfe000000));
    }

    [Test]
    public void TheAddressRegisterTakesWholeWordsOnly()
    {
        Host.PioWrite(0xcf8, 4, 0x80001234);
        Host.PioWrite(0xcf8, 1, 0xff);
        Host.PioWrite(0xcf9, 1, 0xff);
        Host.PioWrite(0xcfa, 2, 0xffff);
        Assert.That(Host.PioRead(0xcf8, 4), Is.EqualTo(0x80001234));
    }

    [Test]
    public void NobodyAnswersWithAllOnes()
    {
        using FakePciDevice device = Plug();
        Assert.That(ConfigRead(2, 0, 4), Is.EqualTo(0xffffffff), "the slot is empty");
        Assert.That(ConfigRead(2, 0, 2), Is.EqualTo(0xffff));
        Assert.That(Host.ConfigRead(0x0108, 0, 4), Is.EqualTo(0xffffffff), "there is no other bus");
        Assert.That(Host.ConfigRead(device.Address.DevFn, 256, 4), Is.EqualTo(0xffffffff), "the offset lies behind a conventional configuration space");
        Host.PioWrite(0xcf8, 4, 0x0000_0800);
        Assert.That(Host.PioRead(0xcfc, 4), Is.EqualTo(0xffffffff), "the enable bit is clear");
        Assert.That(Host.PioRead(0x3f8, 1), Is.EqualTo(0xff));
        Assert.That(Host.MmioRead(new GuestAddress(0xfe000000), 8), Is.EqualTo(ulong.MaxValue));
        Host.MmioWrite(new GuestAddress(0xfe000000), 8, 0);
    }

    [Test]
    public void SlotsAreGivenFromOneAndAddressesAreHonoured()
    {
        using FakePciDevice a = Plug("a"), b = Plug("b", "1f.0"), c = Plug("c");
        Assert.That(((string[])[a.Path, b.Path, c.Path]), Is.EqualTo((string[])["0000:00:01.0", "0000:00:1f.0", "0000:00:02.0"]));
        Assert.That(Assert.Throws<ConfigurationException>(() => Plug("d", "0x1f"))!.Message, Does.Contain("1f.0").And.Contain("'b'"));
        Assert.Throws<ConfigurationException>(() => Plug("d", "20"));
        Assert.Throws<ConfigurationException>(() => Plug("d", "1.8"));
        Assert.That(Assert.Throws<ConfigurationException>(() => Plug("d", "1.1"))!.Message, Does.Contain("multifunction"));
    }

    [Test]
    public void AMultiFunctionSlotShowsAllItsFunctions()
    {
        using FakePciDevice a = Plug("a", "3.0", multiFunction: true), b = Plug("b", "3.1");
        Assert.That(Host.ConfigRead(a.Address.DevFn, 0x0e, 1), Is.EqualTo(0x80));
        Assert.That(Host.ConfigRead(b.Address.DevFn, 0, 2), Is.EqualTo(0x1af4));
    }

    [Test]
    public void AFullBusRefusesMore()
    {
        var all = Enumerable.Range(0, 31).Select(i => Plug($"d{i}")).ToList();
        Assert.Throws<ConfigurationException>(() => Plug("one too many"));
        all[4].Dispose();
        using FakePciDevice again = Plug("again");
        Assert.That(again.Path, Is.EqualTo("0000:00:05.0"));
        all.ForEach(static d => d.Dispose());
    }

    [Test]
    public void BarsAnswerTheirSize()
    {
        using FakePciDevice device = Plug();
        for (int register = 0x10; register < 0x28; register += 4) ConfigWrite(1, register, 4, 0xffffffff);
        Assert.That(Enumerable.Range(0, 6).Select(n => ConfigRead(1, 0x10 + 4 * n, 4)),
            Is.EqualTo((uint[])[0xfffff000, 0xffffffe1, 0xffffc00c, 0xffffffff, 0, 0]));
    }

    [Test]
    public void BarsDecodeWhereTheyAreIfTheCommandSaysSo()
    {
        using FakePciDevice device = Plug();
        ConfigWrite(1, 0x10, 4, 0xfe000000);
        ConfigWrite(1, 0x14, 4, 0xc000);
        ConfigWrite(1, 0x18, 4, 0x00008000);
        ConfigWrite(1, 0x1c, 4, 0x12);
        Assert.That(Host.MmioRead(new GuestAddress(0xfe000010), 4), Is.EqualTo(0xffffffff), "memory decoding is off");
        ConfigWrite(1, 4, 2, 2);
        Assert.That(Host.MmioRead(new GuestAddress(0xfe000010), 4), Is.EqualTo(0x55667788));
        Assert.That(Host.MmioRead(new GuestAddress(0x12_0000_8ff8), 8), Is.EqualTo(0x1122334455667788));
        Assert.That(Host.PioRead(0xc004, 2), Is.EqualTo(0xffff), "port decoding is off");
        ConfigWrite(1, 4, 2, 3);
        Assert.That(Host.PioRead(0xc004, 2), Is.EqualTo(0x7788));
        Host.PioWrite(0xc01c, 4, 0xcafe);
        Host.MmioWrite(new GuestAddress(0xfe000ffc), 4, 0xf00d);
        Assert.That(device.Log, Is.EqualTo((string[])["r0+10/4", "r2+ff8/8", "r1+4/2", "w1+1c/4=cafe", "w0+ffc/4=f00d"]));
        ConfigWrite(1, 0x10, 4, 0xfd000000);
        Assert.That(Host.MmioRead(new GuestAddress(0xfe000010), 4), Is.EqualTo(0xffffffff), "the BAR has moved");
        Assert.That(Host.MmioRead(new GuestAddress(0xfd000010), 1), Is.EqualTo(0x88));
    }

    [Test]
    public void AnAccessOverTheEdgeIsSplit()
    {
        using FakePciDevice device = Plug();
        ConfigWrite(1, 0x10, 4, 0xfe000000);
        ConfigWrite(1, 4, 2, 2);
        device.Answer = 0x42;
        Assert.That(Host.MmioRead(new GuestAddress(0xfe000ffe), 4), Is.EqualTo(0xffff4242));
        Assert.That(device.Log, Is.EqualTo((string[])["r0+ffe/1", "r0+fff/1"]));
    }

    [Test]
    public void WhereBarsOverlapTheLowestFunctionAnswers()
    {
        using FakePciDevice high = Plug("high", "9"), low = Plug("low", "3");
        ConfigWrite(9, 0x10, 4, 0xfe000000);
        ConfigWrite(9, 4, 2, 2);
        ConfigWrite(3, 0x10, 4, 0xfe000000);
        ConfigWrite(3, 4, 2, 2);
        Host.MmioRead(new GuestAddress(0xfe000000), 4);
        Assert.That((low.Log.Count, high.Log.Count), Is.EqualTo((1, 0)));
        low.Dispose();
        Host.MmioRead(new GuestAddress(0xfe000000), 4);
        Assert.That(high.Log, Has.Count.EqualTo(1), "the other function answers once this one is unplugged");
    }

    [TestCase(0x00000000u)]
    [TestCase(0xfffff000u)]
    public void AddressesThatQemuTakesForNoneDoNotDecode(uint address)
    {
        using FakePciDevice device = Plug();
        ConfigWrite(1, 0x10, 4, address);
        ConfigWrite(1, 4, 2, 2);
        Assert.That(device.Bar(0)!.Address, Is.Null);
    }

    [Test]
    public void PinsAreSwizzledOntoSharedLines()
    {
        using FakePciDevice a = Plug("a", "1"), b = Plug("b", "5"), c = Plug("c", "2");
        using (Held())
        {
            a.SetIntx(true);
            b.SetIntx(true);
            c.SetIntx(true);
            a.SetIntx(false);
            b.SetIntx(false);
        }
        Assert.That(_services.Interrupts.Intx, Is.EqualTo(((int, bool)[])[(1, true), (2, true), (1, false)]), "two functions share line 1");
    }

    [Test]
    public void IntxDisableTakesTheLineDownAndBack()
    {
        using FakePciDevice device = Plug();
        using (Held()) device.SetIntx(true);
        Assert.That(ConfigRead(1, 6, 2, lane: 2), Is.EqualTo(0x18));
        ConfigWrite(1, 4, 2, 0x400);
        Assert.That(_services.Interrupts.Levels[1], Is.False);
        ConfigWrite(1, 4, 2, 0);
        Assert.That(_services.Interrupts.Levels[1], Is.True);
        using (Held()) device.Reset();
        Assert.That(_services.Interrupts.Levels[1], Is.False);
    }

    [Test]
    public void AccessesAndPluggingMayRace()
    {
        using FakePciDevice stays = Plug("stays", "1");
        ConfigWrite(1, 0x14, 4, 0xc000);
        ConfigWrite(1, 4, 2, 1);
        using var stop = new CancellationTokenSource();
        Task reader = Task.Run(() =>
        {
            while (!stop.IsCancellationRequested)
            {
                Assert.That(Host.PioRead(0xc000, 4), Is.EqualTo(0x55667788));
                Host.MmioRead(new GuestAddress(0xfe000000), 4);
            }
        });
        for (int i = 0; i < 300; i++)
        {
            using FakePciDevice other = Plug("other", "2");
            Host.ConfigWrite(other.Address.DevFn, 0x10, 4, 0xfe000000);
            Host.ConfigWrite(other.Address.DevFn, 4, 2, 2);
        }
        stop.Cancel();
        Assert.DoesNotThrow(() => reader.GetAwaiter().GetResult());
    }
}
