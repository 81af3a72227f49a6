using Vmm.Core.Devices;
using Vmm.Core.RunStates;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.Devices;

[TestFixture]
public sealed class Serial16550Tests
{
    private const int Data = 0, Ier = 1, Iir = 2, Fcr = 2, Lcr = 3, Mcr = 4, Lsr = 5, Msr = 6, Scr = 7;

    private sealed class FakeLine : ISerialLine
    {
        public List<byte> Sent { get; } = [];

        public bool IsBlocked { get; set; }

        public int Rooms { get; private set; }

        public bool TryWrite(byte value)
        {
            if (!IsBlocked) Sent.Add(value);
            return !IsBlocked;
        }

        public void OnReceiveRoom() => Rooms++;
    }

    private ManualTimeProvider _time = null!;
    private FakeLine _line = null!;
    private readonly List<bool> _irq = [];
    private VmClock _clock = null!;
    private Serial16550 _port = null!;

    [SetUp]
    public void SetUp()
    {
        _time = new ManualTimeProvider();
        _line = new FakeLine();
        _irq.Clear();
        _clock = new VmClock(time: _time);
        _clock.OnVmStateChange(true, RunState.Running);
        _port = new Serial16550(_clock, _line, _irq.Add);
    }

    [TearDown]
    public void TearDown() => _port.Dispose();

    [Test]
    public void PowerOnStateIsTheDataSheets()
    {
        Assert.That(Enumerable.Range(0, 8).Select(_port.ReadRegister), Is.EqualTo(new byte[] { 0, 0, 1, 0, 8, 0x60, 0xb0, 0 }));
        Assert.That(_irq, Is.Empty);
    }

    [Test]
    public void TheDivisorLatchHidesDataAndInterruptEnable()
    {
        _port.WriteRegister(Ier, 0x05);
        _port.WriteRegister(Lcr, 0x83);
        _port.WriteRegister(0, 0x34);
        _port.WriteRegister(1, 0x12);
        Assert.That((_port.ReadRegister(0), _port.ReadRegister(1)), Is.EqualTo(((byte)0x34, (byte)0x12)));
        _port.WriteRegister(Lcr, 0x03);
        Assert.That(_port.ReadRegister(Ier), Is.EqualTo(5));
        Assert.That(_line.Sent, Is.Empty);
    }

    [Test]
    public void RegistersMaskTheirReservedBits()
    {
        _port.WriteRegister(Ier, 0xff);
        _port.WriteRegister(Mcr, 0xff);
        _port.WriteRegister(Lsr, 0xff);
        _port.WriteRegister(Msr, 0xff);
        _port.WriteRegister(Scr, 0xa5);
        Assert.That((_port.ReadRegister(Ier), _port.ReadRegister(Mcr), _port.ReadRegister(Lsr), _port.ReadRegister(Scr)),
            Is.EqualTo(((byte)0x0f, (byte)0x1f, (byte)0x60, (byte)0xa5)));
        Assert.Throws<ArgumentOutOfRangeException>(() => _port.ReadRegister(8));
        Assert.Throws<ArgumentOutOfRangeException>(() => _port.WriteRegister(8, 0));
    }

    [Test]
    public void BytesLeaveAtOnceAndInOrder()
    {
        foreach (byte b in "ok\n"u8) _port.WriteRegister(Data, b);
        Assert.That(_line.Sent, Is.EqualTo("ok\n"u8.ToArray()));
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x60));
    }

    [Test]
    public void TheTransmitInterruptComesOnEnableAndGoesOnRead()
    {
        _port.WriteRegister(Ier, 0x02);
        Assert.That(_port.IsIrqRaised, Is.True);
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0x02));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0x01));
        _port.WriteRegister(Data, 0x41);
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0x02), "the transmit register is empty again");
        Assert.That(_irq, Is.EqualTo(new[] { true, false, true, false }));
    }

    [Test]
    public void WithoutFifoOneByteIsHeldAndTheNextOverruns()
    {
        _port.WriteRegister(Ier, 0x05);
        Assert.That(_port.ReceiveRoom, Is.EqualTo(1));
        _port.Receive("a"u8);
        Assert.That((_port.ReceiveRoom, _port.ReadRegister(Iir)), Is.EqualTo((0, (byte)0x04)));
        _port.Receive("b"u8);
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0x06), "a line status interrupt has priority over received data");
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x63));
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x61), "reading clears the overrun");
        Assert.That(_port.ReadRegister(Data), Is.EqualTo((byte)'b'));
        Assert.That((_port.ReadRegister(Lsr), _port.ReadRegister(Iir), _line.Rooms), Is.EqualTo(((byte)0x60, (byte)0x01, 1)));
    }

    [TestCase(0x01, 1)]
    [TestCase(0x41, 4)]
    [TestCase(0x81, 8)]
    [TestCase(0xc1, 14)]
    public void TheFifoInterruptsAtItsTrigger(byte fcr, int trigger)
    {
        _port.WriteRegister(Ier, 0x01);
        _port.WriteRegister(Fcr, fcr);
        Assert.That(_port.ReceiveRoom, Is.EqualTo(trigger));
        for (int i = 1; i <= trigger; i++)
        {
            Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc1), $"{i - 1} bytes");
            _port.Receive([(byte)i]);
        }
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc4));
        _port.ReadRegister(Data);
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc1));
    }

    [Test]
    public void AFullFifoKeepsWhatItHas()
    {
        _port.WriteRegister(Fcr, 0x01);
        _port.Receive([.. Enumerable.Range(0, 17).Select(static i => (byte)i)]);
        Assert.That(_port.ReceiveRoom, Is.Zero);
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x63));
        Assert.That(Enumerable.Range(0, 17).Select(_ => _port.ReadRegister(Data)), Is.EqualTo(new byte[] { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0 }));
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x60));
    }

    [Test]
    public void BytesBelowTheTriggerTimeOut()
    {
        _port.WriteRegister(Ier, 0x01);
        _port.WriteRegister(Lcr, 0x03);
        _port.WriteRegister(Fcr, 0xc1);
        _port.Receive("ab"u8);
        _time.Advance(TimeSpan.FromMilliseconds(4));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc1), "4 characters of 10 bits at 9600 baud are 4.17 ms");
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xcc));
        Assert.That(_port.ReadRegister(Data), Is.EqualTo((byte)'a'));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc1), "reading ends the timeout");
        _time.Advance(TimeSpan.FromMilliseconds(10));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xcc), "reading starts another timeout for the remaining bytes");
    }

    [Test]
    public void TheTimeoutStandsStillWhileTheVmDoes()
    {
        _port.WriteRegister(Ier, 0x01);
        _port.WriteRegister(Fcr, 0xc1);
        _port.Receive("a"u8);
        _clock.OnVmStateChange(false, RunState.Paused);
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xc1));
        _clock.OnVmStateChange(true, RunState.Running);
        _time.Advance(TimeSpan.FromMilliseconds(10));
        Assert.That(_port.ReadRegister(Iir), Is.EqualTo(0xcc));
    }

    [Test]
    public void ALoadedTimeoutGoesOffOnTheOtherSide()
    {
        _port.WriteRegister(Ier, 0x01);
        _port.WriteRegister(Fcr, 0xc1);
        _port.Receive("a"u8);
        byte[] body = Save(Serial16550.Description, _port);
        var otherTime = new ManualTimeProvider();
        var otherClock = new VmClock(time: otherTime);
        using var other = new Serial16550(otherClock);
        Load(Serial16550.Description, other, body);
        otherTime.Advance(TimeSpan.FromSeconds(1));
        Assert.That(other.ReadRegister(Iir), Is.EqualTo(0xc1), "the timeout does not expire before the VM runs");
        otherClock.OnVmStateChange(true, RunState.Running);
        otherTime.Advance(TimeSpan.FromMilliseconds(10));
        Assert.That((other.ReadRegister(Iir), other.ReadRegister(Data)), Is.EqualTo(((byte)0xcc, (byte)'a')));
    }

    [Test]
    public void FifoResetsEmptyOneSideEach()
    {
        _port.WriteRegister(Fcr, 0x01);
        _port.Receive("abc"u8);
        _line.IsBlocked = true;
        foreach (byte b in "xyz"u8) _port.WriteRegister(Data, b);
        _port.WriteRegister(Fcr, 0x03);
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x00), "received data is gone, transmission still waits");
        _port.WriteRegister(Fcr, 0x05);
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x20), "only the byte in the shift register is left");
        _line.IsBlocked = false;
        _port.RetryTransmit();
        Assert.That(_line.Sent, Is.EqualTo("x"u8.ToArray()));
    }

    [Test]
    public void LoopbackReturnsBytesAndModemLines()
    {
        _port.WriteRegister(Mcr, 0x10);
        _port.WriteRegister(Data, 0x5a);
        Assert.That((_port.ReadRegister(Data), _line.Sent.Count, _line.Rooms), Is.EqualTo(((byte)0x5a, 0, 0)));
        foreach ((byte mcr, byte msr) in new (byte, byte)[] { (0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1f, 0xf0) })
        {
            _port.WriteRegister(Mcr, mcr);
            Assert.That(_port.ReadRegister(Msr), Is.EqualTo(msr), $"MCR 0x{mcr:x2}");
        }
        _port.WriteRegister(Mcr, 0);
        Assert.That(_port.ReadRegister(Msr), Is.EqualTo(0xb0));
    }

    [Test]
    public void ABreakIsAZeroByteWithItsMark()
    {
        _port.WriteRegister(Ier, 0x04);
        _port.ReceiveBreak();
        Assert.That((_port.ReadRegister(Iir), _port.ReadRegister(Lsr), _port.ReadRegister(Data)), Is.EqualTo(((byte)0x06, (byte)0x71, (byte)0)));
        Assert.That(_port.IsIrqRaised, Is.False);
    }

    [Test]
    public void ABlockedLineKeepsBytesUntilItTakesThem()
    {
        _line.IsBlocked = true;
        _port.WriteRegister(Fcr, 0x01);
        foreach (byte b in "abc"u8) _port.WriteRegister(Data, b);
        Assert.That(_port.ReadRegister(Lsr), Is.Zero);
        _port.RetryTransmit();
        _line.IsBlocked = false;
        _port.RetryTransmit();
        Assert.That(_line.Sent, Is.EqualTo("abc"u8.ToArray()));
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x60));
        _port.RetryTransmit();
        Assert.That(_line.Sent, Has.Count.EqualTo(3));
    }

    [Test]
    public void AByteIsDroppedAfterFiveRefusals()
    {
        _line.IsBlocked = true;
        _port.WriteRegister(Data, 0x41);
        for (int i = 0; i < 3; i++) _port.RetryTransmit();
        Assert.That(_port.ReadRegister(Lsr), Is.EqualTo(0x20));
        _port.RetryTransmit();
        Assert.That((_port.ReadRegister(Lsr), _line.Sent.Count), Is.EqualTo(((byte)0x60, 0)));
    }

    [Test]
    public void AFullTransmitFifoDropsItsOldest()
    {
        _line.IsBlocked = true;
        _port.WriteRegister(Fcr, 0x01);
        for (byte i = 0; i < 18; i++) _port.WriteRegister(Data, i);
        _line.IsBlocked = false;
        _port.RetryTransmit();
        Assert.That(_line.Sent, Is.EqualTo(new byte[] { 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 }));
    }

    [TestCase("000c 00 00 01 00 08 20 b0 00 00", "", "LSR.TEMT set")]
    [TestCase("000c 00 00 01 00 08 60 b0 00 00", "05 0a 73657269616c2f747372 00000001 00000001 58 57", "LSR.TEMT clear")]
    [TestCase("000c 00 00 01 00 08 60 b0 00 01", "05 10 73657269616c2f726563765f6669666f 00000001 00000000000000000000000000000000 00000010 00000001", "head 16")]
    [TestCase("000c 00 00 01 00 08 60 b0 00 01", "05 10 73657269616c2f726563765f6669666f 00000001 00000000000000000000000000000000 00000000 00000011", "num 17")]
    public void InconsistentStateIsRefused(string fields, string subsection, string message)
    {
        Exception? error = Caught.By(() => Load(Serial16550.Description, _port, Hex(fields + subsection)));
        Assert.That(error, Is.InstanceOf<Vmm.Core.Errors.VmmException>());
        Assert.That(error!.Message, Does.Contain(message).And.Contain("serial"));
    }

    [Test]
    public void AnInFlightByteGoesOutOnceTheVmRuns()
    {
        using var services = new TestServices();
        var line = new FakeLine { IsBlocked = true };
        using var source = new SerialDevice(DeviceOptions.Parse("serial,id=a"), services, line);
        source.Port.WriteRegister(Fcr, 0x01);
        foreach (byte b in "moved"u8) source.Port.WriteRegister(Data, b);
        byte[] body = Save(SerialDevice.Description, source);
        var otherLine = new FakeLine();
        using var other = new SerialDevice(DeviceOptions.Parse("serial,id=b"), services, otherLine);
        Load(SerialDevice.Description, other, body);
        Assert.That(otherLine.Sent, Is.Empty);
        other.OnVmStateChange(true, RunState.Running);
        Assert.That(otherLine.Sent, Is.EqualTo("moved"u8.ToArray()));
    }

    [Test]
    public void DisposeLeavesNoTimers()
    {
        var time = new ManualTimeProvider();
        new Serial16550(new VmClock(time: time)).Dispose();
        Assert.That(time.TimerCount, Is.Zero);
    }
}
