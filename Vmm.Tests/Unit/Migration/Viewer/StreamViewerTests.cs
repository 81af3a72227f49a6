using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;
using Vmm.Core.Workloads;
using Vmm.Migration.Status;
using Vmm.Migration.Viewer;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Viewer;

/// <summary>The viewer reports every way to break a stream with its place, and reads on where it can.</summary>
[TestFixture]
public sealed class StreamViewerTests
{
    private static StreamBuilder Stream() => new StreamBuilder().Header();

    private static StreamDocument View(StreamBuilder stream) => StreamViewer.Read(new MemoryFile(stream.ToArray()));

    private static IEnumerable<TestCaseData> Broken()
    {
        static TestCaseData Case(string name, StreamSeverity severity, string message, StreamBuilder stream) =>
            new TestCaseData(severity, message, stream).SetArgDisplayNames(name);

        const StreamSeverity violation = StreamSeverity.Violation, fatal = StreamSeverity.Fatal;
        byte[] page = new byte[4096];
        yield return Case("empty", fatal, "ends at offset 0", new StreamBuilder());
        yield return Case("magic", fatal, "expected 'QEVM', found 0x12345678", new StreamBuilder().U32(0x12345678));
        yield return Case("version 2", fatal, "obsolete", new StreamBuilder().U32(0x5145564d).U32(2));
        yield return Case("version 4", fatal, "expected 3, found 4", new StreamBuilder().U32(0x5145564d).U32(4));
        yield return Case("machine name", fatal, "WireLimits.MachineNameBytes", new StreamBuilder().U32(0x5145564d).U32(3).U8(7).U32(0x7fffffff));
        yield return Case("configuration subsection", fatal, "configuration/colour", Stream().U8(5).Counted("configuration/colour").U32(1));
        yield return Case("page bits", violation, "page size of 256 bytes", Stream().U8(5).Counted("configuration/target-page-bits").U32(1).U32(8).Eof());
        yield return Case("section type", fatal, "found 0x42", Stream().U8(0x42));
        yield return Case("subsection between sections", fatal, "found 0x05", Stream().RamStart().U8(5));
        yield return Case("no EOF", fatal, "ended at offset 17", Stream());
        yield return Case("trailing bytes", violation, "3 bytes follow", Stream().Eof().Bytes([1, 2, 3]));
        yield return Case("section id taken", violation, "section id 1 is taken by 'ram/0'",
            Stream().RamStart().Full(1, "timer", 2, new byte[24]).Eof());
        yield return Case("second START", violation, "second START", Stream().RamStart().RamStart().Eof());
        yield return Case("second FULL", violation, "second FULL", Stream().Full(0, "timer", 2, new byte[24]).Full(0, "timer", 2, new byte[24]).Eof());
        yield return Case("id 0 for ram", violation, "section id 0", Stream().RamStart(id: 0).Eof());
        yield return Case("PART unbound", fatal, "the id of a START section, found 9", Stream().RamPart(static _ => { }, id: 9));
        yield return Case("PART after END", violation, "a Part section after its End", Stream().RamStart().RamPart(static _ => { }, type: 3).RamPart(static _ => { }).Eof());
        yield return Case("unknown iterable", fatal, "'ram' or 'PATH/vfio', whose forms are known, found 'vfio'", Stream().First(1, 5, "vfio", 0, 1).U64(1));
        yield return Case("ram version", violation, "version 3, 4 is expected", Stream().First(1, 1, "ram", 0, 3).U64(4).U64(0x10).Footer(1).Eof());
        yield return Case("footer id", violation, "footer has id 7, the section has 0", Stream().First(4, 0, "timer", 0, 2).Bytes(new byte[24]).Footer(7).Eof());
        yield return Case("footer mark", fatal, "expected 0x7e, found 0x04",
            Stream().Full(0, "timer", 2, new byte[24]).First(4, 1, "globalstate", 0, 1).Bytes(new byte[104]).U8(4));
        yield return Case("no description", fatal, "a VMDESC that describes it", Stream().Full(3, "cpu", 12, new byte[9]).Eof());

        yield return Case("command", violation, "command 99 is not known", Stream().Command(99, [1, 2, 3]).Eof());
        yield return Case("command length", violation, "Ping has a payload of 3 bytes", Stream().Command(2, [1, 2, 3]).Eof());
        yield return Case("ping", violation, "PING without an open return path", Stream().Command(2, [0, 0, 0, 1]).Eof());
        yield return Case("discard ranges", violation, "17 bytes of RAM discard ranges", Stream().Command(6, [0, 1, (byte)'m', 0, .. new byte[17]]).Eof());
        yield return Case("package length", fatal, "goes past the end", Stream().Command(7, [0x10, 0, 0, 0]).Eof());
        yield return Case("package end", fatal, "end of a package", Stream().Command(7, [0, 0, 0, 3]).Eof().U8(0).U8(0).Eof());
        yield return Case("package in package", fatal, "no package inside a package", Stream().Command(7, [0, 0, 0, 9]).Command(7, [0, 0, 0, 0]).Eof());

        yield return Case("flags 0", fatal, "flags 0x000", Stream().RamStart().RamPart(static b => b.U64(0)).Eof());
        yield return Case("two flags", fatal, "flags 0x00a", Stream().RamStart().RamPart(static b => b.U64(0x00a)).Eof());
        yield return Case("hook", fatal, "flags 0x080", Stream().RamStart().RamPart(static b => b.U64(0x080)).Eof());
        yield return Case("CONTINUE first", fatal, "a block name before the first CONTINUE", Stream().RamStart().RamPart(static b => b.U64(0x022).U8(0)).Eof());
        yield return Case("unknown block", violation, "'x' is not in the block list", Stream().RamStart().RamPart(static b => b.U64(0x002).Counted("x").U8(0)).Eof());
        yield return Case("outside the block", violation, "offset 0x4000 is outside RAM block 'm' of 0x4000", Stream().RamStart().RamPart(static b => b.U64(0x4002).Counted("m").U8(0)).Eof());
        yield return Case("zero page fill", violation, "fills with 0x5a", Stream().RamStart().RamPart(static b => b.U64(0x002).Counted("m").U8(0x5a)).Eof());
        yield return Case("xbzrle encoding", fatal, "expected 1, found 2", Stream().RamStart().RamPart(static b => b.U64(0x040).Counted("m").U8(2)).Eof());
        yield return Case("xbzrle length", fatal, "XBZRLE length", Stream().RamStart().RamPart(static b => b.U64(0x040).Counted("m").U8(1).U16(4097)).Eof());
        yield return Case("xbzrle runs", violation, "do not decode", Stream().RamStart().RamPart(static b => b.U64(0x040).Counted("m").U8(1).U16(2).Bytes([0, 0])).Eof());
        yield return Case("duplicate block", violation, "'m' is listed twice",
            Stream().RamStart(body: static b => b.U64(0x2004).Counted("m").U64(0x1000).Counted("m").U64(0x1000)).Eof());
        yield return Case("block too long", fatal, "the 0x1000 bytes left of the total, found 0x2000",
            Stream().RamStart(body: static b => b.U64(0x1004).Counted("m").U64(0x2000)).Eof());
        yield return Case("empty block", fatal, "found 0x0", Stream().RamStart(body: static b => b.U64(0x1004).Counted("m").U64(0)).Eof());
        yield return Case("block not of pages", violation, "'n': length 0x800 is not a multiple of the page size",
            Stream().RamStart(body: static b => b.U64(0x2004).Counted("m").U64(0x1800).Counted("n").U64(0x800)).Eof());
        yield return Case("list in a PART", violation, "a block list in a PART", Stream().RamStart().RamPart(static b => b.U64(0x1004).Counted("n").U64(0x1000)).Eof());
        yield return Case("page cut", fatal, "ended at offset", Stream().RamStart().U8(2).U32(1).U64(8).Counted("m").Bytes(page.AsSpan(1)));

        const string u32 = """{"name": "a", "type": "uint32", "size": 4}""";
        yield return Case("VMDESC JSON", violation, "VMDESC cannot be read", Stream().Eof().VmDesc("{]}"));
        yield return Case("VMDESC cut", fatal, "is cut off", Stream().Eof().U8(6).U32(1000).Text("{}"));
        yield return Case("VMDESC then bytes", violation, "2 bytes follow", Stream().Full(3, "dev", 1, new byte[4]).Described("dev", 1, u32).Bytes([1, 2]));
        yield return Case("VMDESC version", violation, "version 2, VMDESC says 1", Stream().Full(3, "dev", 2, new byte[4]).Described("dev", 1, u32));
        yield return Case("VMDESC without section", violation, "'dev/0', which the stream does not have", Stream().Described("dev", 1, u32));
        yield return Case("section without VMDESC", violation, "does not describe", Stream().Full(0, "timer", 2, new byte[24]).Full(3, "dev", 1, new byte[4]).Described("dev", 1, u32));
        yield return Case("body longer than VMDESC", fatal, "section footer", Stream().RamStart().Full(3, "dev", 1, new byte[5]).Described("dev", 1, u32));
        yield return Case("field size", violation, "gives type uint32 3 bytes, it has 4",
            Stream().Full(3, "dev", 1, new byte[3]).Described("dev", 1, """{"name": "a", "type": "uint32", "size": 3}"""));
        yield return Case("struct size", violation, "4 bytes, its parts add up to 2", Stream().Full(3, "dev", 1, new byte[4]).Described("dev", 1,
            """{"name": "s", "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [{"name": "a", "type": "uint16", "size": 2}]}, "size": 4}"""));
        yield return Case("subsection missing", fatal, "05 and 'dev/x' as in VMDESC", Stream().Full(3, "dev", 1, new byte[4]).Described("dev", 1, u32,
            """, "subsections": [{"vmsd_name": "dev/x", "version": 1, "fields": []}]"""));
        yield return Case("huge field", fatal, "ended at offset", Stream().Full(3, "dev", 1, new byte[4]).Described("dev", 1,
            """{"name": "a", "type": "buffer", "size": 9223372036854775807}"""));
        yield return Case("sum overflows", violation, "VMDESC cannot be read", Stream().Full(0, "timer", 2, new byte[24]).Described("dev", 1,
            """{"name": "a", "array_len": 2147483647, "type": "buffer", "size": 9223372036854775807}"""));
        yield return Case("machine name length", violation, "4 bytes, VMDESC says 5",
            Stream().Eof().VmDesc("""{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}, {"name": "name", "type": "buffer", "size": 5}]}, "page_size": 4096, "devices": []}"""));
    }

    [TestCaseSource(nameof(Broken))]
    public void ABrokenStreamIsReportedWithItsPlace(object severity, string message, object stream)
    {
        StreamDocument document = View((StreamBuilder)stream);
        StreamFinding[] found = [.. document.Violations.Where(f => f.Message.Contains(message))];
        Assert.That(found, Has.Length.EqualTo(1), string.Join('\n', document.Findings));
        Assert.That(found[0].Severity, Is.EqualTo((StreamSeverity)severity));
        Assert.That(found[0].Offset, Is.InRange(0, document.LengthBytes));
        Assert.That(document.IsComplete, Is.EqualTo((StreamSeverity)severity != StreamSeverity.Fatal));
        var text = new StringWriter();
        StreamText.Write(document, text);
        Assert.That(text.ToString(), Does.Contain(message).And.Contain("violation"));
    }

    [Test]
    public void StreamsOfUnusualButLegalFormAreWellFormed()
    {
        Assert.That(View(Stream().Eof()).IsValid, "a stream needs no sections");
        Assert.That(View(new StreamBuilder().U32(0x5145564d).U32(3).Eof()).IsValid, "a stream needs no configuration");
        Assert.That(View(Stream().RamStart(body: static b => b.U64(4)).Eof()).IsValid, "a RAM section needs no blocks");
        StreamDocument twice = View(Stream().RamStart().RamPart(static b => b.U64(2).Counted("m").U8(0)).RamPart(static b => b.U64(0x1022).U8(0)).Eof());
        Assert.That((twice.IsValid, twice.RamBlocks[0].Pages.Zero), Is.EqualTo((true, 2L)), "the CONTINUE flag works across sections");
        Assert.That(View(Stream().Command(7, [0, 0, 0, 6]).Command(4).Eof().Eof()).Entries.Select(static e => (e.Kind, e.Depth)).TakeLast(3),
            Is.EqualTo(new[] { (StreamEntryKind.Command, 1), (StreamEntryKind.Eof, 1), (StreamEntryKind.Eof, 0) }), "a package has its own EOF");
    }

    [Test]
    public void HugePageBlocksCarryTheirPageSizeAfterAdvise()
    {
        byte[] advise = [0, 0, 0, 0, 0, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0];
        StreamDocument stream = View(Stream().Command(3, advise).RamStart(body: static b =>
            b.U64(0x400004).Counted("huge").U64(0x200000).U64(0x200000).Counted("small").U64(0x200000)).Eof());
        Assert.That(stream.Violations, Is.Empty);
        Assert.That(stream.RamBlocks.Select(static b => b.PageSize), Is.EqualTo(new ulong?[] { 0x200000, null }));
    }

    [Test]
    public void ListsTreesAndInlineStatesAreReadElementByElement()
    {
        const string element = """ "vmsd_name": "e", "version": 1, "fields": [{"name": "v", "type": "uint8", "size": 1}]""";
        string fields = string.Join(", ",
            $$"""{"name": "queue", "type": "qtailq",{{element}},{{element}}, "size": 5}""",
            """{"name": "none", "type": "qlist", "size": 1}""",
            $$"""{"name": "tree", "type": "gtree",{{element}}, "size": 15}""",
            $$"""{"name": "tmp", "type": "tmp",{{element}}, "size": 1}""",
            $$"""{"name": "vs", "array_len": 2, "type": "vstruct",{{element}}, "size": 1}""",
            """{"name": "p", "array_len": 2, "type": "ptr-marker", "size": 1}""",
            """{"name": "i", "index": 3, "type": "int16", "size": 2}""",
            """{"name": "t", "type": "timer", "size": 8}""");
        byte[] body =
        [
            1, 10, 1, 11, 0, // queue
            0, // none
            0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 77, 12, 0, // tree
            13, 14, 15, 0x30, 0x31, 0xff, 0xfe, 255, 255, 255, 255, 255, 255, 255, 255,
        ];
        StreamDocument stream = View(Stream().Full(3, "dev", 1, body).Described("dev", 1, fields));
        Assert.That(stream.Findings, Is.Empty);
        IReadOnlyList<StreamField> f = stream.Entries.Single(static e => e.Kind == StreamEntryKind.Full).Fields;
        Assert.That(f.Select(static x => x.Length), Is.EqualTo(new long[] { 5, 1, 15, 1, 2, 2, 2, 8 }));
        Assert.That(f[0].Children.Select(static c => c.Children.Single().Value), Is.EqualTo(new object[] { 10UL, 11UL }));
        Assert.That(f[2].Children.Single().Children.Select(static c => (c.Name, c.Value)), Is.EqualTo(new (string, object?)[] { ("key", 77UL), ("v", 12UL) }));
        Assert.That(f[3].Children.Single().Value, Is.EqualTo(13UL));
        Assert.That(f[4].Children.Select(static c => c.Children.Single().Value), Is.EqualTo(new object[] { 14UL, 15UL }));
        Assert.That(f[5].Value, Is.EqualTo(new object[] { "null", "present" }));
        Assert.That((f[6].Name, f[6].Value, f[7].Value), Is.EqualTo(("i[3]", (object)(-2L), (object)"not pending")));
    }

    [Test]
    public void WhatIsTooMuchIsLeftOutNotHeld()
    {
        // VMDESC describes a struct array of three million one-byte elements.
        string fields = """{"name": "s", "array_len": 3000000, "type": "struct", "struct": {"vmsd_name": "e", "version": 1, "fields": [{"name": "v", "type": "uint8", "size": 1}]}, "size": 1}""";
        StreamDocument stream = View(Stream().Full(3, "dev", 1, new byte[3_000_000]).Described("dev", 1, fields));
        Assert.That(stream.Violations, Is.Empty);
        Assert.That(stream.Findings.Single().Message, Does.Contain("WireLimits.ViewerFields"));
        StreamField field = stream.Entries.Single(static e => e.Kind == StreamEntryKind.Full).Fields.Single();
        Assert.That((field.Length, field.Children.Count), Is.EqualTo((3_000_000L, WireLimits.ViewerFields / 2)).Within(2));

        var commands = Stream();
        for (int i = 0; i <= WireLimits.ViewerEntries; i++) commands.Command(4);
        stream = View(commands.Eof());
        Assert.That(stream.Violations.Single().Message, Does.Contain("WireLimits.ViewerEntries"));
        Assert.That(stream.Entries, Has.Count.EqualTo(WireLimits.ViewerEntries + 1), "one more entry stands for the rest, which the viewer did not read");
    }

    [Test]
    public void NamesOfTheFileReachNoTerminalAsControlSequences()
    {
        StreamDocument stream = View(new StreamBuilder().Header("no\u001b[31mne").Command(10, [4, 0x1b, (byte)'[', (byte)'2', (byte)'J']).Eof().Text("x"));
        var text = new StringWriter();
        StreamText.Write(stream, text);
        Assert.That(text.ToString(), Does.Contain("no?[31mne").And.Not.Contain("\u001b"));
    }

    [Test]
    public async Task WhatVmmSavesPassesTheCheck()
    {
        using var vm = new TestVm(new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "a", SizeBytes = 1 << 20 }, new RamBlockOptions { Name = "b", SizeBytes = 64 << 10 }],
            Devices = [.. new[] { "serial", "scratch", "pattern,state=on" }.Select(DeviceOptions.Parse)],
        }, static b => b.AddPlugin<SerialPlugin>().AddPlugin<WorkloadPlugin>());
        vm.FilledRandom(3, halfZero: true);
        var channel = new MemoryChannel();
        Assert.That(await vm.Engine.Migrate(channel), Is.EqualTo(MigrationStatus.Completed));
        var ram = new RamImage();
        StreamDocument stream = StreamViewer.Read(new MemoryFile(channel.Written), new StreamViewOptions { Ram = ram });
        Assert.That(stream.Findings, Is.Empty);
        Assert.That(stream.Entries.Where(static e => e.Kind == StreamEntryKind.Full).Select(static e => e.Name),
            Is.EqualTo(new[] { "timer", "serial", "scratch", "pattern", "globalstate" }));
        foreach (RamBlock block in vm.Vm.Memory.Blocks)
            Assert.That(ram.Blocks[block.Name].AsSpan().SequenceEqual(block.ReadOnlySlice(0, (int)block.SizeBytes)), block.Name);
    }

    [Test]
    public void AFileThatCannotBeOpenedIsAnError() =>
        Assert.That(() => StreamViewer.ReadFile("/nonexistent/stream"), Throws.TypeOf<ChannelException>().With.Message.Contains("/nonexistent/stream"));
}
