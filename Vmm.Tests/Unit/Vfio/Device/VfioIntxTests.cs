using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

/// <summary>While the VM runs, INTx bypasses this process by an irqfd; it returns to this process when the level must be known.</summary>
[TestFixture]
public sealed class VfioIntxTests
{
    private const ulong Bar0 = VfioDeviceFixture.Bar0;

    private FakeAccelerator _accelerator = null!;

    [Test]
    public void ARunningVmsPinIsAnIrqFdAndItsBarsAreMemory()
    {
        using VfioDeviceFixture f = Fixture();
        Assert.That((_accelerator.Lines, _accelerator.Slots), Is.EqualTo((Array.Empty<int>(), Array.Empty<ulong>())), "a stopped VM has no irqfd and traps accesses");
        Start(f);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1 f", "0 unmask 0+1"]));
        Assert.That((_accelerator.Lines, _accelerator.Slots), Is.EqualTo((new[] { 1 }, new[] { Bar0 })));
        f.Io.IrqLog.Clear();
        f.Io.Fire(VfioPciIrq.Intx);
        f.MmioRead(Bar0 + 0x100);
        Assert.That(IsReadable(_accelerator.Pins[1].Trigger), "only the accelerator reads the eventfd");
        Assert.That((f.Interrupts.Levels[1], f.Io.IrqLog), Is.EqualTo((false, Array.Empty<string>())), "an access does not end the interrupt");
        Stop(f);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1 -", "0 unmask 0+1"]), "the unmask makes the device signal an asserted interrupt again, now to this process");
        Assert.That(_accelerator.Lines, Is.Empty);
        f.Interrupts.WaitFor(static i => i.Levels[1], "level for the VM to save");
    }

    [Test]
    public void ALevelThatTheGuestHasNotServedWhenTheVmStartsIsRaisedAgainByTheAccelerator()
    {
        using VfioDeviceFixture f = Fixture();
        f.Io.Fire(VfioPciIrq.Intx);
        f.Interrupts.WaitFor(static i => i.Levels[1], "INTx");
        Start(f);
        Assert.That(IsReadable(_accelerator.Pins[1].Trigger));
        Assert.That((f.Interrupts.Levels[1], f.Io.IrqLog), Is.EqualTo((false, new[] { "0 unmask 0+1 f" })), "the guest's acknowledgement unmasks the interrupt");
    }

    [Test]
    public void ALevelThatMovedAssertedIsAnIrqFdOnTheDestination()
    {
        using VfioDeviceFixture source = Fixture();
        source.Io.Fire(VfioPciIrq.Intx);
        source.Interrupts.WaitFor(static i => i.Levels[1], "INTx");
        byte[] record = source.Save();
        using VfioDeviceFixture target = Fixture(mapped: false);
        target.Load(record);
        Assert.That((target.Interrupts.Levels[1], _accelerator.Slots), Is.EqualTo((false, Array.Empty<ulong>())), "the PCI bus's section raises the line, not the device");
        Start(target);
        Assert.That((IsReadable(_accelerator.Pins[1].Trigger), _accelerator.Slots), Is.EqualTo((true, new[] { Bar0 })));
    }

    [Test]
    public void APinThatTheGuestDisablesIsOursUntilItIsEnabled()
    {
        using VfioDeviceFixture f = Fixture();
        Start(f);
        f.Io.IrqLog.Clear();
        f.Write(4, 2, 0x407);
        Assert.That((_accelerator.Lines, f.Io.IrqLog), Is.EqualTo((Array.Empty<int>(), new[] { "0 unmask 0+1 -", "0 unmask 0+1" })));
        Assert.That(_accelerator.Slots, Is.EqualTo(new[] { Bar0 }), "without an interrupt there is no end of one to trap, so the BAR stays mapped");
        f.Io.Fire(VfioPciIrq.Intx);
        LeakCheck.WaitFor(() => f.Device.Function.IsIntxAsserted, "the pin is not asserted");
        Assert.That(f.Interrupts.Levels[1], Is.False, "the guest does not see a disabled pin");
        f.Write(4, 2, 7);
        Assert.That((IsReadable(_accelerator.Pins[1].Trigger), f.Interrupts.Levels[1]), Is.EqualTo((true, false)));
    }

    [Test]
    public void MessagesAndResetsTakeThePinDownAndBringTheIrqFdBack()
    {
        using VfioDeviceFixture f = Fixture();
        Start(f);
        f.Io.IrqLog.Clear();
        f.Write(0x52, 2, 0x11);
        Assert.That((_accelerator.Lines, f.Io.IrqLog), Is.EqualTo((Array.Empty<int>(), new[] { "0 unmask 0+1 -", "0 disable", "1 bind 0+2 ff" })));
        Assert.That(_accelerator.Slots, Is.EqualTo(new[] { Bar0 }));
        f.Io.IrqLog.Clear();
        f.Write(0x52, 2, 0x10);
        Assert.That(f.Io.IrqLog, Is.EqualTo((string[])["1 disable", "0 bind 0+1 f", "0 unmask 0+1 f", "0 unmask 0+1"]));
        f.Locked(static d => d.Reset());
        Assert.That((_accelerator.Lines, _accelerator.Slots), Is.EqualTo((new[] { 1 }, Array.Empty<ulong>())), "after the reset no BAR has an address");
    }

    [Test]
    public void AnAcknowledgementGoesAsAMessageToADeviceThatTakesNoEventfd()
    {
        FakeVfioIo io = Device(takesUnmaskEventFd: false);
        using VfioDeviceFixture f = Fixture(io: io);
        Start(f);
        f.Io.IrqLog.Clear();
        Posix.SignalEventFd(_accelerator.Pins[1].Resample);
        LeakCheck.WaitFor(() => { using (f.Services.Bql.Acquire()) return io.IrqLog.Count == 1; }, "no unmask message came");
        Assert.That(io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1"]));
        Stop(f);
        Assert.That((_accelerator.Lines, io.IrqLog), Is.EqualTo((Array.Empty<int>(), new[] { "0 unmask 0+1", "0 unmask 0+1" })));
    }

    [TestCase("no resample"), TestCase("refused"), TestCase("not masked by itself"), TestCase("told not to")]
    public void WhereThereIsNoIrqFdAnAccessEndsTheInterruptAndBarsAreTrapped(string why)
    {
        FakeVfioIo io = Device(takesUnmaskEventFd: why != "not masked by itself");
        if (why == "not masked by itself") io.Irq(VfioPciIrq.Intx, 1);
        if (why == "refused") io.UnmaskEventFdAnswer = Errno.ENOTTY;
        using VfioDeviceFixture f = Fixture(io: io, options: why == "told not to" ? ",x-no-kvm-intx=on" : "");
        _accelerator.HasResample = why != "no resample";
        Start(f);
        f.Write(4, 2, 3);
        f.Write(4, 2, 7);
        Assert.That((_accelerator.Lines, _accelerator.Slots), Is.EqualTo((Array.Empty<int>(), Array.Empty<ulong>())));
        string[] asked = why switch
        {
            "no resample" => ["0 unmask 0+1 f", "0 unmask 0+1 -"],
            "refused" => ["0 unmask 0+1 f"],
            _ => [],
        };
        Assert.That(io.IrqLog, Is.EqualTo(asked), "the VMM asks the device only once");
        io.IrqLog.Clear();
        io.Fire(VfioPciIrq.Intx);
        f.Interrupts.WaitFor(static i => i.Levels[1], "INTx");
        f.MmioRead(Bar0);
        Assert.That((f.Interrupts.Levels[1], io.IrqLog), Is.EqualTo((false, new[] { "0 unmask 0+1" })));
    }

    [Test]
    public void AnEventfdThatTheProcessBeforeLeftBoundIsReplaced()
    {
        FakeVfioIo io = Device();
        io.UnmaskEventFdAnswer = Errno.EBUSY;
        using VfioDeviceFixture f = Fixture(io: io);
        Start(f);
        Assert.That(io.IrqLog, Is.EqualTo((string[])["0 unmask 0+1 f", "0 unmask 0+1 -", "0 unmask 0+1 f", "0 unmask 0+1"]));
        Assert.That(_accelerator.Lines, Is.EqualTo(new[] { 1 }));
    }

    private VfioDeviceFixture Fixture(FakeVfioIo? io = null, string options = "", bool mapped = true)
    {
        _accelerator = new FakeAccelerator();
        var f = new VfioDeviceFixture(io ?? Device(), options, ownedServices: new TestServices { Accelerator = _accelerator });
        if (mapped) f.Mapped();
        f.Io.IrqLog.Clear();
        return f;
    }

    private static FakeVfioIo Device(bool takesUnmaskEventFd = true) =>
        new FakeVfioIo { TakesUnmaskEventFd = takesUnmaskEventFd }
            .Bar(0, 4096, 0, new VfioRegionArea(0, 4096)).Bar(1, 32, 1).Bar(2, 0x4000, 0xc)
            .Capability(0x50, 0x05, 0, 0x84, 0x01).Irq(VfioPciIrq.Msi, 4).PoweredOn();

    private static void Start(VfioDeviceFixture f)
    {
        using (f.Services.Bql.Acquire()) f.Services.Notifier.Start();
    }

    private static void Stop(VfioDeviceFixture f)
    {
        using (f.Services.Bql.Acquire()) f.Services.Notifier.Stop(RunState.Paused);
    }

    private static bool IsReadable(OwnedFd fd) => (Posix.Poll(fd, Posix.POLLIN, null, 0, out _) & Posix.POLLIN) != 0;
}
