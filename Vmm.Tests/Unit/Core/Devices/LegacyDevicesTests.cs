using Vmm.Core.Devices;
using Vmm.Core.RunStates;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Devices;

/// <summary>The RTC, the keyboard controller and the power registers as a guest's kernel uses them, and their sections.</summary>
[TestFixture]
internal sealed class LegacyDevicesTests
{
    private readonly List<IDisposable> _owned = [];

    [TearDown]
    public void DisposeOwned()
    {
        for (int i = _owned.Count - 1; i >= 0; i--) _owned[i].Dispose();
        _owned.Clear();
    }

    [Test]
    public void TheClockShowsUtcInBcdAndInBinary()
    {
        (TestServices services, Cmos cmos) = Clock();
        services.Time.Advance(new TimeSpan(20_000, 13, 14, 15));
        Assert.That(Registers(cmos, 0, 2, 4, 7, 8, 9, 0x32), Is.EqualTo((int[])[0x15, 0x14, 0x13, 0x04, 0x10, 0x24, 0x20]), "2024-10-04 13:14:15");
        Put(cmos, 0x0b, 0x04);
        Assert.That(Registers(cmos, 0, 2, 4), Is.EqualTo((int[])[15, 14, 0x81]), "binary, 12 hours, afternoon");
    }

    [Test]
    public void TheGuestSetsTheTimeAndItGoesOnAlsoAfterAMove()
    {
        (TestServices services, Cmos cmos) = Clock();
        Put(cmos, 0x0b, 0x82);
        foreach ((int register, byte value) in ((int, byte)[])[(0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x19)]) Put(cmos, register, value);
        Put(cmos, 0x0b, 0x02);
        services.Time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(Registers(cmos, 0, 2, 4), Is.EqualTo((int[])[0x59, 0x59, 0x23]));
        byte[] wire = SectionBytes.Save(Cmos.Description, cmos);
        Assert.That(wire, Has.Length.EqualTo(245));
        var other = new Cmos(services, services.Time);
        _owned.Add(other);
        SectionBytes.Load(Cmos.Description.Bind(other), wire);
        services.Time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(Registers(other, 0, 2, 4, 7, 8, 9, 0x32), Is.EqualTo((int[])[0, 0, 0, 1, 1, 0, 0x20]), "2000-01-01");
        Assert.That(Registers(cmos, 0x32), Is.EqualTo((int[])[0x20]));
        Assert.That(SectionBytes.Save(Cmos.Description, other), Is.EqualTo(SectionBytes.Save(Cmos.Description, cmos)));
    }

    [Test]
    public void AlarmUpdateAndPeriodInterruptUntilTheGuestReadsWhy()
    {
        (TestServices services, Cmos cmos) = Clock();
        var levels = new List<bool>();
        _owned.Add(services.Irqs.Attach((line, level) => { if (line == 8) levels.Add(level); }));
        foreach ((int register, byte value) in ((int, byte)[])[(1, 0x03), (3, 0xff), (5, 0xff), (0x0b, 0x22)]) Put(cmos, register, value);
        services.Time.Advance(TimeSpan.FromSeconds(2.5));
        Assert.That(levels, Is.Empty, "the alarm is half a second away");
        services.Time.Advance(TimeSpan.FromSeconds(1));
        Assert.That((levels.LastOrDefault(), Register(cmos, 0x0c) & 0xa0), Is.EqualTo((true, 0xa0)), "the alarm raises the line");
        Assert.That((levels[^1], Register(cmos, 0x0c)), Is.EqualTo((false, 0)), "reading register C lowers the line");
        Put(cmos, 0x0a, 0x2f);
        Put(cmos, 0x0b, 0x42);
        services.Time.Advance(TimeSpan.FromMilliseconds(501));
        Assert.That((levels[^1], Register(cmos, 0x0c) & 0xc0), Is.EqualTo((true, 0xc0)), "the periodic interrupt comes after half a second");
    }

    [Test]
    public void TheKeyboardControllerAnswersItsCommandsAndMoves()
    {
        TestServices services = Services();
        var controller = new I8042(services.Requests, services.Irqs);
        controller.Command.Write(0, 1, 0xaa);
        Assert.That((controller.Command.Read(0, 1) & 5, controller.Data.Read(0, 1), controller.Command.Read(0, 1) & 1), Is.EqualTo((5UL, 0x55UL, 0UL)), "the self test succeeds");
        controller.Command.Write(0, 1, 0x60);
        controller.Data.Write(0, 1, 0x65);
        controller.Command.Write(0, 1, 0x20);
        byte[] wire = SectionBytes.Save(I8042.Description, controller);
        var other = new I8042(services.Requests, services.Irqs);
        SectionBytes.Load(I8042.Description.Bind(other), wire);
        Assert.That((other.Command.Read(0, 1) & 1, other.Data.Read(0, 1), other.Command.Read(0, 1) & 1), Is.EqualTo((1UL, 0x65UL, 0UL)), "the pending byte moved with the controller");
        Assert.That(wire[..4], Is.EqualTo((byte[])[0, 0x1d, 0x65, 4]), "write_cmd, status, mode, pending");
    }

    [Test]
    public void SleepTypeFiveSwitchesOffAndTheResetCommandResets([Values] bool reset)
    {
        TestServices services = Services();
        using var asked = new BlockingQueue();
        services.Requests.Attach(asked.Add);
        if (reset) new I8042(services.Requests, services.Irqs).Command.Write(0, 1, 0xfe);
        else
        {
            var power = new AcpiPower(services.Requests);
            power.Write(2, 2, 0x0120);
            Assert.That((power.Read(2, 2) & 0xffff, power.Read(4, 2)), Is.EqualTo((0x0120UL, 1UL)));
            power.Write(4, 2, 5 << 10 | 1 << 13);
        }
        Assert.That(asked.Take(), Is.EqualTo(reset ? GuestRequest.Reset : GuestRequest.Shutdown));
    }

    private (TestServices, Cmos) Clock()
    {
        TestServices services = Services();
        using (services.Bql.Acquire()) services.Clock.OnVmStateChange(true, RunState.Running);
        var cmos = new Cmos(services, services.Time);
        _owned.Add(cmos);
        return (services, cmos);
    }

    private TestServices Services()
    {
        var services = new TestServices();
        _owned.Add(services);
        return services;
    }

    private static int Register(Cmos cmos, int index)
    {
        cmos.Write(0, 1, (ulong)index);
        return (int)cmos.Read(1, 1);
    }

    private static int[] Registers(Cmos cmos, params int[] indices) => [.. indices.Select(i => Register(cmos, i))];

    private static void Put(Cmos cmos, int index, byte value)
    {
        cmos.Write(0, 1, (ulong)index);
        cmos.Write(1, 1, value);
    }

    private sealed class BlockingQueue : IDisposable
    {
        private readonly System.Collections.Concurrent.BlockingCollection<GuestRequest> _items = [];

        public void Add(GuestRequest request) => _items.Add(request);

        public GuestRequest? Take() => _items.TryTake(out GuestRequest request, TimeSpan.FromSeconds(20)) ? request : null;

        public void Dispose() => _items.Dispose();
    }
}
