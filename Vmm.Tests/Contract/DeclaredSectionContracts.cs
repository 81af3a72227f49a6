using Vmm.Core.Devices;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Contract;

[TestFixture]
internal sealed class ScratchDeviceContract : SaveVmContract<ScratchDevice>
{
    protected override (ScratchDevice Device, IVmStateSection Section) Create()
    {
        var services = new TestServices();
        var device = new ScratchDevice(DeviceOptions.Parse("scratch"), services);
        return (device, services.SaveVm.Entries().Single().VmState!);
    }

    protected override IEnumerable<(string, Action<ScratchDevice>)> States() =>
    [
        ("value", static d => d.Value = 0xdeadbeef),
        ("locked", static d => { d.Value = 1; d.Lock(); }),
        ("started", static d => d.OnVmStateChange(true, RunState.Running)),
    ];

    protected override void Reset(ScratchDevice device) => device.Reset();

    protected override (byte[], byte[]) OldestVersion() => (Hex("00000007 01"), Hex("00000007 01 0000000000000001"));
}

[TestFixture]
internal sealed class SerialDeviceContract : SaveVmContract<SerialDevice>
{
    /// <summary>A line that accepts no byte, so that bytes stay in the transmitter.</summary>
    private sealed class BlockedLine : ISerialLine
    {
        public bool TryWrite(byte value) => false;

        public void OnReceiveRoom()
        {
        }
    }

    protected override (SerialDevice Device, IVmStateSection Section) Create()
    {
        var services = new TestServices();
        var device = new SerialDevice(DeviceOptions.Parse("serial"), services, new BlockedLine());
        services.Clock.Set(1_000_000);
        return (device, services.SaveVm.Entries().Single().VmState!);
    }

    protected override IEnumerable<(string, Action<SerialDevice>)> States() =>
    [
        ("registers", static d =>
        {
            d.Port.WriteRegister(3, 0x80);
            d.Port.WriteRegister(0, 0x34);
            d.Port.WriteRegister(1, 0x12);
            d.Port.WriteRegister(3, 0x1b);
            d.Port.WriteRegister(1, 0x0f);
            d.Port.WriteRegister(4, 0x0b);
            d.Port.WriteRegister(7, 0x5a);
        }),
        ("received byte", static d => d.Port.Receive([0x41])),
        ("received FIFO and timeout", static d =>
        {
            d.Port.WriteRegister(2, 0xc1);
            d.Port.Receive("hello"u8);
        }),
        ("byte in flight", static d => d.Port.WriteRegister(0, 0x42)),
        ("transmit FIFO", static d =>
        {
            d.Port.WriteRegister(2, 0x01);
            foreach (byte b in "in flight"u8) d.Port.WriteRegister(0, b);
        }),
        ("hidden transmit interrupt", static d =>
        {
            d.Port.WriteRegister(1, 0x06);
            d.Port.ReceiveBreak();
        }),
    ];

    protected override void Reset(SerialDevice device) => device.Reset();

    /// <summary>The section's version 2 does not lower the version of the struct inside: that is 3, so fcr_vmstate is there (stream 2.3).</summary>
    protected override (byte[], byte[]) OldestVersion() => (Hex("0001 41 01 c4 03 0b 61 b0 00 81"), Hex("0001 41 01 c4 03 0b 61 b0 00 81"));
}

[TestFixture]
internal sealed class Serial16550Contract : SaveVmContract<Serial16550>
{
    protected override (Serial16550 Device, IVmStateSection Section) Create()
    {
        var port = new Serial16550(new VmClock(time: new ManualTimeProvider()));
        return (port, Serial16550.Description.Bind(port));
    }

    protected override IEnumerable<(string, Action<Serial16550>)> States() =>
    [
        ("received", static p => p.Receive("x"u8)),
        ("FIFO", static p => { p.WriteRegister(2, 1); p.Receive("abc"u8); }),
    ];

    protected override void Reset(Serial16550 device) => device.Reset();

    protected override (byte[], byte[]) OldestVersion() => (Hex("0001 41 01 04 03 0b 61 b0 00"), Hex("0001 41 01 04 03 0b 61 b0 00 00"));
}

[TestFixture]
public sealed class VmClockContract : SaveVmContract<VmClock>
{
    protected override (VmClock Device, IVmStateSection Section) Create()
    {
        var services = new TestServices();
        services.Clock.Register(services.SaveVm);
        return (services.Clock, services.SaveVm.Entries().Single().VmState!);
    }

    protected override IEnumerable<(string, Action<VmClock>)> States() => [("has run", static c => c.Set(3333501)), ("a long time", static c => c.Set(long.MaxValue / 2))];

    protected override void Reset(VmClock device) => device.Set(0);

    protected override (byte[], byte[]) OldestVersion() => (Hex("0000000000000005 ffffffffffffffff"), Hex("0000000000000005 0000000000000000 0000000000000000"));
}
