using System.Security.Cryptography;
using System.Text.Json;
using Vmm.Migration.Ram;
using Vmm.Migration.Viewer;
using Vmm.Tests.Support;

namespace Vmm.Tests.GoldenTests;

/// <summary>The viewer reads QEMU's captures of every machine type to the last byte and rebuilds RAM from them.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public class GoldenViewerTests
{
    private const string RamA = "27485cdc414b90bbbf7fce4fc8999eafb8e1486e19ae601e32cd0d48df4e9a6a";
    private const string RamZ = "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58";

    /// <summary>Captures of main channels and VM state files, without conn0, which was cut on purpose.</summary>
    private static IEnumerable<string> MainChannels() =>
        Golden.Names.Where(static n => !n.Contains(".rp.") && !n.Contains(".ram.") && !n.Contains("preempt.fwd") && !n.Contains(".ch0.") && !n.Contains(".ch1.") && !n.Contains("conn0"));

    [TestCaseSource(nameof(MainChannels))]
    public void EveryStreamIsReadToItsLastByte(string name)
    {
        StreamDocument stream = View(Golden.Read(name));
        Assert.That(stream.Violations, Is.Empty);
        Assert.That(stream.IsComplete);
        StreamEntry last = stream.Entries[^1];
        Assert.That(last.Offset + last.Length, Is.EqualTo(stream.LengthBytes));
        Assert.That(stream.HasVmDescription, Is.EqualTo(!name.Contains("postcopy") && !name.Contains("novmdesc")));
        // No byte lies between two entries. The content of a PACKAGED command counts as entries after the command.
        foreach ((StreamEntry a, StreamEntry b) in stream.Entries.Zip(stream.Entries.Skip(1)))
            Assert.That(b.Offset, Is.EqualTo(a.Offset + a.Length), $"{a} {b}");
        // Fields account for every byte of a device section between its header and its footer.
        foreach (StreamEntry entry in stream.Entries.Where(static e => e.Kind == StreamEntryKind.Full))
        {
            int footer = name.Contains("nofooter") ? 0 : 5;
            Assert.That(14 + entry.Name!.Length + Bytes(entry.Fields) + footer, Is.EqualTo(entry.Length), entry.Name);
        }
    }

    [TestCaseSource(nameof(MainChannels))]
    public void TextAndJsonShowEveryEntry(string name)
    {
        StreamDocument stream = View(Golden.Read(name), new StreamViewOptions { ListPages = true });
        var text = new StringWriter();
        StreamText.Write(stream, text);
        using var bytes = new MemoryStream();
        StreamJson.Write(stream, bytes);
        using JsonDocument json = JsonDocument.Parse(bytes.ToArray());
        Assert.That(json.RootElement.GetProperty("entries").GetArrayLength(), Is.EqualTo(stream.Entries.Count));
        Assert.That(json.RootElement.GetProperty("valid").GetBoolean());
        foreach (StreamEntry entry in stream.Entries.Where(static e => e.Kind == StreamEntryKind.Full))
            Assert.That(text.ToString(), Does.Contain($"FULL {entry.SectionId} '{entry.Name}' instance {entry.InstanceId} version {entry.VersionId}"));
        Assert.That(text.ToString(), Does.Contain("well-formed"));
    }

    [Test]
    public void TheDevicesOfQ35AreThoseOfTheSpecification()
    {
        string[] expected =
        [
            "6 apic/0 v3", "0 timer/0 v2", "3 cpu_common/0 v1", "4 cpu/0 v12", "5 kvm-tpr-opt/0 v1", "7 fw_cfg/0 v2", "8 0000:00:00.0/mch/0 v1", "9 PCIHost/0 v1",
            "10 PCIBUS/0 v1", "11 dma/0 v1", "12 dma/1 v1", "13 mc146818rtc/0 v3", "14 0000:00:1f.0/ICH9LPC/0 v1", "15 i8259/0 v1", "16 i8259/1 v1", "17 ioapic/0 v3",
            "18 hpet/0 v2", "19 i8254/0 v3", "20 pcspk/0 v1", "21 ps2kbd/0 v3", "22 ps2mouse/0 v2", "23 pckbd/0 v3", "24 vmmouse/0 v0", "25 port92/0 v1",
            "26 0000:00:1f.2/ich9_ahci/0 v1", "27 i2c_bus/0 v1", "28 0000:00:1f.3/ich9_smb/0 v1", "37 0000:00:01.0/virtio-rng/0 v1",
            "38 0000:00:02.0/virtio-net/0 v11", "39 serial/0 v3", "40 acpi_build/0 v1", "41 globalstate/0 v1",
        ];
        Assert.That(Devices("q35-111-devices.bin"), Is.EqualTo(expected));
        StreamDocument stream = View(Golden.Read("q35-111-devices.bin"));
        Assert.That(stream.Machine, Is.EqualTo("pc-q35-11.1"));
        Assert.That(stream.RamBlocks.Select(static b => b.Name), Is.EquivalentTo(
            (string[])["pc.ram", "/rom@etc/acpi/tables", "pc.rom", "pc.bios", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"]));
        // QEMU 7.2 has the same sections, but apic comes after kvm-tpr-opt.
        Assert.That(Devices("q35-72-devices.bin").Select(static d => d[(d.IndexOf(' ') + 1)..]).Order(), Is.EqualTo(expected.Select(static d => d[(d.IndexOf(' ') + 1)..]).Order()));
        Assert.That(Devices("pc-111-devices.bin"), Has.Some.Contains("piix3").IgnoreCase.Or.Some.Contains("PIIX"));
    }

    [Test]
    public void ValuesAreThoseOfTheStream()
    {
        StreamDocument stream = View(Golden.Read("none-111-uuid.bin"));
        StreamEntry configuration = stream.Entries[1];
        Assert.That(configuration.Fields.Select(static f => f.Value), Is.EqualTo(new object[] { "none", "11112222-3333-4444-5555-666677778888" }));
        StreamEntry state = stream.Entries.Single(static e => e.Name == "globalstate");
        Assert.That(state.Fields.Select(static f => f.Name), Is.EqualTo(new[] { "size", "runstate", "has_vm_was_suspended", "vm_was_suspended", "unused" }));
        Assert.That((state.Fields[0].Value, StreamText.ValueText(state.Fields[0].Value)), Is.EqualTo(((object)10UL, "10 (0xa)")));
        var text = new StringWriter();
        StreamText.Write(stream, text);
        Assert.That(text.ToString(), Does.Contain("runstate: \"prelaunch\" (buffer, 32 bytes)"));

        StreamEntry cpu = View(Golden.Read("q35-111-devices.bin")).Entries.Single(static e => e.Name == "cpu");
        StreamField segments = cpu.Fields.Single(static f => f.Name == "env.segs");
        Assert.That((segments.Type, segments.Children.Count), Is.EqualTo(("struct[6]", 6)));
        StreamField code = segments.Children[1];
        Assert.That(code.Children.Select(static f => (f.Name, f.Value)), Is.EqualTo(new (string, object?)[]
        {
            ("selector", 0xf000UL), ("base", 0xffff0000UL), ("limit", 0xffffUL), ("flags", 0x9b00UL),
        }), "the reset value of CS");
        Assert.That(cpu.Fields.Single(static f => f.Type == "subsection").Name, Is.EqualTo("cpu/poll_control_msr"));
    }

    [Test]
    public void APostcopyStreamShowsItsPackage()
    {
        StreamDocument stream = View(Golden.Read("none-111-postcopy.main.fwd.bin"));
        Assert.That(stream.Entries.Where(static e => e.Depth == 1).Select(static e => e.Name),
            Is.EqualTo(new[] { "PostcopyListen", "timer", "globalstate", "Ping", "Ping", "PostcopyRun" }));
        StreamEntry discard = stream.Entries.Single(static e => e.Name == "PostcopyRamDiscard");
        Assert.That(discard.Fields.Select(static f => f.Value), Is.EqualTo(new object[] { "m", "0x0+0x100000" }));
    }

    [TestCase("none-111-plain.bin", RamA, 10, 246)]
    [TestCase("none-72-plain.bin", RamA, 10, 246)]
    [TestCase("none-72-savevm.bin", RamA, 10, 246)]
    [TestCase("none-111-zeropage-none.bin", RamA, 256, 0)]
    [TestCase("none-111-bgsnapshot.bin", RamZ, 0, 256)]
    [TestCase("none-111-mapped-ram.bin", RamA, 10, 0)]
    [TestCase("none-111-mapped-ram-offset.bin", RamA, 10, 0)]
    [TestCase("none-111-mapped-ram-zpnone.bin", RamA, 256, 0)]
    [TestCase("none-111-mapped-ram-multifd-directio.bin", RamA, 10, 0)]
    [TestCase("none-111-postcopy.main.fwd.bin", RamA, 10, 246)]
    public void RamIsRebuilt(string name, string sha256, long data, long zero)
    {
        var ram = new RamImage();
        StreamDocument stream = View(Golden.Read(name), new StreamViewOptions { Ram = ram, ListPages = true });
        Assert.That(Convert.ToHexStringLower(SHA256.HashData(ram.Blocks["m"])), Is.EqualTo(sha256));
        RamPageCounts pages = stream.RamBlocks.Single().Pages;
        Assert.That((pages.Data, pages.Zero, pages.Xbzrle), Is.EqualTo((data, zero, 0L)));
        RamPageRecord[] list = [.. stream.Entries.SelectMany(static e => e.Pages)];
        Assert.That(list.Length, Is.EqualTo(data + zero));
        Assert.That(list.Count(static p => p.Kind == RamSaveFlags.Page), Is.EqualTo(data));
    }

    [TestCase("none-111-xbzrle")]
    [TestCase("none-72-xbzrle")]
    public void DeltasGiveTheFinalRam(string name)
    {
        var ram = new RamImage();
        StreamDocument stream = View(Golden.Read(name + ".bin"), new StreamViewOptions { Ram = ram });
        Assert.That(stream.RamBlocks.Single().Pages.Xbzrle, Is.EqualTo(6));
        Assert.That(ram.Blocks["m"].AsSpan().SequenceEqual(Golden.Read(name + ".ram.bin")));
    }

    [Test]
    public void MappedRamFilesMayHaveHolesAndSeveralBlocks()
    {
        Assert.That(View(Golden.Read("none-111-mapped-ram-offset.bin")).StartOffset, Is.EqualTo(0x3000));
        StreamDocument stream = View(Golden.Read("q35-111-mapped-ram.bin"));
        Assert.That(stream.RamBlocks.Select(static b => (b.BitmapOffset, b.PagesOffset)), Is.EqualTo(new (ulong?, ulong?)[]
        {
            (0x8b, 0x100000), (0x300039, 0x400000), (0x42002b, 0x500000), (0x52002c, 0x600000), (0x61003a, 0x700000), (0x701037, 0x800000),
        }));
    }

    [Test]
    public void ARecoveryConnectionHasNoHeaderAndTheOneBeforeItIsCut()
    {
        StreamDocument second = View(Golden.Read("none-111-postcopy-recover.conn1.fwd.bin"));
        Assert.That(second.Findings[0].Message, Does.Contain("no header"));
        Assert.That(second.Entries.Take(2).Select(static e => e.Name), Is.EqualTo(new[] { "RecvBitmap", "PostcopyResume" }));
        StreamDocument first = View(Golden.Read("none-111-postcopy-recover.conn0.fwd.bin"));
        Assert.That(first.IsComplete, Is.False);
        Assert.That(first.Violations.Single().ToString(), Does.Contain("ram/0").And.Contain("ended at offset 263650"));
    }

    /// <summary>The viewer refuses what is not a main channel and says why.</summary>
    [TestCase("none-111-multifd.ch0.fwd.bin", "multifd channel")]
    [TestCase("none-111-postcopy.main.rp.bin", "QEVM")]
    [TestCase("none-111-postcopy-preempt.preempt.fwd.bin", "QEVM")]
    [TestCase("none-111-xbzrle.ram.bin", "QEVM")]
    public void WhatIsNotAMainChannelIsRefused(string name, string message)
    {
        StreamDocument stream = View(Golden.Read(name));
        Assert.That(stream.Violations.Single().Message, Does.Contain(message));
        Assert.That(stream.Violations.Single().Severity, Is.EqualTo(StreamSeverity.Fatal));
    }

    [TestCaseSource(nameof(MainChannels))]
    public void EveryProperPrefixFailsTheCheck(string name)
    {
        byte[] bytes = Golden.Read(name);
        StreamDocument whole = View(bytes);
        long eof = whole.Entries.Last(static e => e is { Kind: StreamEntryKind.Eof, Depth: 0 }).Offset;
        // A stream may end right after EOF, because VMDESC is optional when the reader knows every section without it.
        long legal = eof + 1;
        int step = bytes.Length <= 8192 ? 1 : Math.Max(1, bytes.Length / 300);
        for (int length = 0; length < bytes.Length; length += length < 300 || length > bytes.Length - 10 ? 1 : step)
        {
            if (length == legal) continue;
            StreamDocument stream = View(bytes[..length]);
            Assert.That(stream.IsValid, Is.False, $"prefix of {length} bytes");
            Assert.That(stream.Violations.Count(), Is.LessThanOrEqualTo(1), $"prefix of {length} bytes: one reason is enough");
        }
    }

    private static StreamDocument View(byte[] bytes, StreamViewOptions? options = null) => StreamViewer.Read(new MemoryFile(bytes), options);

    private static string[] Devices(string name) =>
        [.. View(Golden.Read(name)).Entries.Where(static e => e.Kind == StreamEntryKind.Full).Select(static e => $"{e.SectionId} {e.Name}/{e.InstanceId} v{e.VersionId}")];

    /// <summary>Bytes of all fields. The length of a subsection includes its own header.</summary>
    private static long Bytes(IReadOnlyList<StreamField> fields) => fields.Sum(static f => f.Length);
}
