using System.Text;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.Devices;

/// <summary>
/// Our sections equal QEMU's in bytes and VMDESC: <c>timer</c> of a <c>-M none</c> machine that never ran, and <c>serial</c> of a q35 machine with
/// one ISA serial port.
/// </summary>
[TestFixture]
public sealed class QemuSectionTests
{
    private const string TimerDesc = "\"vmsd_name\": \"timer\", \"version\": 2, \"fields\": [{\"name\": \"cpu_ticks_offset\", \"type\": \"int64\", \"size\": 8}, "
        + "{\"name\": \"unused\", \"type\": \"unused_buffer\", \"size\": 8}, {\"name\": \"cpu_clock_offset\", \"type\": \"int64\", \"size\": 8}]";

    private const string SerialDesc = "\"vmsd_name\": \"serial\", \"version\": 3, \"fields\": [{\"name\": \"state\", \"type\": \"struct\", \"struct\": {"
        + "\"vmsd_name\": \"serial\", \"version\": 3, \"fields\": [{\"name\": \"divider\", \"type\": \"uint16\", \"size\": 2}, {\"name\": \"rbr\", \"type\": \"uint8\", \"size\": 1}, "
        + "{\"name\": \"ier\", \"type\": \"uint8\", \"size\": 1}, {\"name\": \"iir\", \"type\": \"uint8\", \"size\": 1}, {\"name\": \"lcr\", \"type\": \"uint8\", \"size\": 1}, "
        + "{\"name\": \"mcr\", \"type\": \"uint8\", \"size\": 1}, {\"name\": \"lsr\", \"type\": \"uint8\", \"size\": 1}, {\"name\": \"msr\", \"type\": \"uint8\", \"size\": 1}, "
        + "{\"name\": \"scr\", \"type\": \"uint8\", \"size\": 1}, {\"name\": \"fcr_vmstate\", \"type\": \"uint8\", \"size\": 1}]}, \"size\": 11}]";

    [TestCase("none-72-noram.bin", "timer", TimerDesc)]
    [TestCase("none-111-noram.bin", "timer", TimerDesc)]
    [TestCase("q35-72-devices.bin", "serial", SerialDesc)]
    [TestCase("q35-111-devices.bin", "serial", SerialDesc)]
    [TestCase("q35-72machine-on-111-devices.bin", "serial", SerialDesc)]
    public void WhatANewVmSavesEqualsTheCapture(string capture, string name, string desc)
    {
        using var services = new TestServices();
        services.Clock.Register(services.SaveVm);
        using var serial = new SerialDevice(DeviceOptions.Parse("serial"), services);
        SaveVmEntry entry = services.SaveVm.Find(name, 0)!;
        byte[] body = Save(entry.VmState!);
        // The section's bytes from the header's idstr to the footer's marker.
        byte[] section = [(byte)name.Length, .. Encoding.ASCII.GetBytes(name), 0, 0, 0, 0, 0, 0, 0, (byte)entry.VersionId, .. body, 0x7e];
        byte[] stream = Golden.Read(capture);
        Assert.That(stream.AsSpan().IndexOf(section), Is.Positive);
        Assert.That(Describe(entry.VmState!), Is.EqualTo($"{{{desc}}}"));
        Assert.That(stream.AsSpan().IndexOf(Encoding.ASCII.GetBytes($"{{\"name\": \"{name}\", \"instance_id\": 0, {desc}}}")), Is.Positive);
        Load(entry.VmState!, body);
    }

    [Test]
    public void TheClockRegistersTheTimerSectionFirst()
    {
        using var services = new TestServices();
        services.Clock.Register(services.SaveVm);
        SaveVmEntry entry = services.SaveVm.Entries().Single();
        Assert.That((entry.IdStr, entry.InstanceId, entry.SectionId, entry.VersionId, entry.MinimumVersionId), Is.EqualTo(("timer", 0, 0u, 2, 1)));
        Assert.That(Save(entry.VmState!), Is.EqualTo(new byte[24]));
    }

    [Test]
    public void TheTimerSectionOfAQemuThatRanLoads()
    {
        using var services = new TestServices();
        byte[] body = Hex("00000000007f2a92 0000000000000000 000000000032dd7d");
        Load(VmClock.Description, services.Clock, body);
        Assert.That((services.Clock.NowTicks, services.Clock.NowNs), Is.EqualTo((8333970L, 3333501L)));
        Assert.That(Save(VmClock.Description, services.Clock), Is.EqualTo(body));
    }

    /// <summary>The test spells out the subsections of QEMU's vmstate_serial, because they hold transfers under way, which an idle machine never has.</summary>
    [Test]
    public void TheSubsectionsHaveQemusLayout()
    {
        byte[] body = Hex(
            "000c 00 07 c1 03 0b 00 b0 00 c1"
            + "05 13 73657269616c2f7468725f6970656e64696e67 00000001 00000001"
            + "05 0a 73657269616c2f747372 00000001 00000002 58 57"
            + "05 10 73657269616c2f726563765f6669666f 00000001 61626364000000000000000000000000 00000001 00000003"
            + "05 10 73657269616c2f786d69745f6669666f 00000001 78790000000000000000000000000000 00000000 00000002"
            + "05 19 73657269616c2f6669666f5f74696d656f75745f74696d6572 00000001 0000000000123456"
            + "05 17 73657269616c2f74696d656f75745f6970656e64696e67 00000001 00000001"
            + "05 0b 73657269616c2f706f6c6c 00000001 00000001 0000000000654321");
        using var services = new TestServices();
        using var device = new SerialDevice(DeviceOptions.Parse("serial"), services);
        IVmStateSection section = services.SaveVm.Entries().Single().VmState!;
        Load(section, body);
        Assert.That(Save(section), Is.EqualTo(body));
        string desc = Describe(section);
        Assert.That(desc, Does.Contain("{\"vmsd_name\": \"serial/recv_fifo\", \"version\": 1, \"fields\": [{\"name\": \"recv_fifo\", \"type\": \"struct\", \"struct\": {"
            + "\"vmsd_name\": \"Fifo8\", \"version\": 1, \"fields\": [{\"name\": \"data\", \"type\": \"buffer\", \"size\": 16}, {\"name\": \"head\", \"type\": \"uint32\", \"size\": 4}, "
            + "{\"name\": \"num\", \"type\": \"uint32\", \"size\": 4}]}, \"size\": 24}]}"));
        Assert.That(DescribedLength(desc), Is.EqualTo(body.Length));
        Assert.That(new[] { device.Port.ReadRegister(0), device.Port.ReadRegister(0), device.Port.ReadRegister(0) }, Is.EqualTo("bcd"u8.ToArray()), "the FIFO's first byte is at its head");
    }

    [Test]
    public void TwoPortsAreTwoInstances()
    {
        using var services = new TestServices();
        using var first = new SerialDevice(DeviceOptions.Parse("serial,id=a"), services);
        using var second = new SerialDevice(DeviceOptions.Parse("serial,id=b"), services);
        Assert.That(services.SaveVm.Entries().Select(static e => e.ToString()), Is.EqualTo(new[] { "serial/0", "serial/1" }));
    }
}
