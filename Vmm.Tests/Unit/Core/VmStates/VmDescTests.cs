using System.Text.Json;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>VMDESC describes fields (stream 2.6, 17.20) in the forms of QEMU 7.2, 10.0 and 11.1.</summary>
[TestFixture]
public sealed class VmDescTests
{
    private sealed class Cell
    {
        public byte V;
        public bool Extra;

        public static readonly VmStateDescription<Cell> Plain = new() { Name = "cell", Fields = [VmState.UInt8<Cell>("v", static c => ref c.V)] };

        public static readonly VmStateDescription<Cell> WithSubsection = new()
        {
            Name = "cell", Fields = [VmState.UInt8<Cell>("v", static c => ref c.V)],
            Subsections = [new() { Name = "cell/x", Needed = static c => c.Extra, Fields = [VmState.UInt8<Cell>("w", static c => ref c.V)] }],
        };

        public static readonly VmStateDescription<Cell> WithPredicate = new()
        {
            Name = "cell", Fields = [VmState.UInt8<Cell>("v", static c => ref c.V, exists: static (c, _) => c.Extra)],
        };
    }

    private sealed class Device
    {
        public uint A, B;
        public uint[] Regs = new uint[3];
        public Cell[] Cells = [new(), new() { Extra = true }];
        public Cell?[] Slots = [new(), new(), null, null, null, new()];
        public List<Cell> List = [new(), new()];
        public int Count = 1;
    }

    private const string PlainCell = "{\"vmsd_name\": \"cell\", \"version\": 1, \"fields\": [{\"name\": \"v\", \"type\": \"uint8\", \"size\": 1}]}";

    private static string Fields(VmStateField<Device>[] fields, VmDescOptions? options = null, Device? device = null)
    {
        VmStateDescription<Device> description = new() { Name = "dev", Fields = fields };
        device ??= new Device();
        string text = Describe(description, device, options);
        const string head = "{\"vmsd_name\": \"dev\", \"version\": 1, \"fields\": [";
        Assert.That(text, Does.StartWith(head).And.EndsWith("]}"));
        return text[head.Length..^2];
    }

    [Test]
    public void ACompressibleArrayIsOneObjectWithItsLength() => Assert.That(
        Fields([VmState.Array<Device, uint>("regs", VmStateTypes.UInt32, 3, static d => d.Regs)]),
        Is.EqualTo("{\"name\": \"regs\", \"array_len\": 3, \"type\": \"uint32\", \"size\": 4}"));

    [Test]
    public void AnArrayOfOneHasNoLengthAndOneOfNoneIsSilent()
    {
        VmStateField<Device> field = VmState.VarArray<Device, uint>("regs", VmStateTypes.UInt32, static d => d.Count, static d => d.Regs);
        Assert.That(Fields([field]), Is.EqualTo("{\"name\": \"regs\", \"type\": \"uint32\", \"size\": 4}"));
        Assert.That(Fields([field], device: new Device { Count = 0 }), Is.Empty);
    }

    [Test]
    public void RepeatedNamesAreNumbered() => Assert.That(
        Fields([VmState.UInt32<Device>("r", static d => ref d.A), VmState.Unused<Device>(2), VmState.UInt32<Device>("r", static d => ref d.B), VmState.Unused<Device>(1)]),
        Is.EqualTo("{\"name\": \"r[0]\", \"type\": \"uint32\", \"size\": 4}, {\"name\": \"unused[0]\", \"type\": \"unused_buffer\", \"size\": 2}, "
            + "{\"name\": \"r[1]\", \"type\": \"uint32\", \"size\": 4}, {\"name\": \"unused[1]\", \"type\": \"unused_buffer\", \"size\": 1}"));

    [Test]
    public void AStructArrayIsDescribedByItsFirstElement() => Assert.That(
        Fields([VmState.StructArray<Device, Cell>("cells", Cell.Plain, 2, static d => d.Cells)]),
        Is.EqualTo($"{{\"name\": \"cells\", \"array_len\": 2, \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}"));

    [Test]
    public void ElementsThatMayDifferAreDescribedOneByOneAndOnlyOldFormsNumberThem()
    {
        VmStateField<Device>[] fields = [VmState.StructArray<Device, Cell>("cells", Cell.WithSubsection, 2, static d => d.Cells)];
        string sub = "{\"vmsd_name\": \"cell\", \"version\": 1, \"fields\": [{\"name\": \"v\", \"type\": \"uint8\", \"size\": 1}], "
            + "\"subsections\": [{\"vmsd_name\": \"cell/x\", \"version\": 1, \"fields\": [{\"name\": \"w\", \"type\": \"uint8\", \"size\": 1}]}]}";
        Assert.That(Fields(fields), Is.EqualTo(
            $"{{\"name\": \"cells\", \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}, {{\"name\": \"cells\", \"type\": \"struct\", \"struct\": {sub}, \"size\": 14}}"));
        Assert.That(Fields(fields, VmDescOptions.Qemu72), Is.EqualTo(
            $"{{\"name\": \"cells\", \"index\": 0, \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}, "
            + $"{{\"name\": \"cells\", \"index\": 1, \"type\": \"struct\", \"struct\": {sub}, \"size\": 14}}"));
    }

    [Test]
    public void APredicateAnywhereInsideForbidsCompression()
    {
        Assert.That(Fields([VmState.Array<Device, uint>("regs", VmStateTypes.UInt32, 3, static d => d.Regs, exists: static (_, _) => true)]).Split("\"regs\""), Has.Length.EqualTo(4));
        Assert.That(Fields([VmState.StructArray<Device, Cell>("cells", Cell.WithPredicate, 2, static d => d.Cells)]), Does.Not.Contain("array_len"));
    }

    [TestCase(true)]
    [TestCase(false)]
    public void PointerArraysAreDescribedInRuns(bool newest)
    {
        string marker = newest ? "ptr-marker" : "nullptr";
        Assert.That(Fields([VmState.PointerArray<Device, Cell>("slots", Cell.Plain, 6, static d => d.Slots)], newest ? VmDescOptions.Qemu111 : VmDescOptions.Qemu100), Is.EqualTo(
            $"{{\"name\": \"slots\", \"array_len\": 2, \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}, "
            + $"{{\"name\": \"slots\", \"array_len\": 3, \"type\": \"{marker}\", \"size\": 1}}, "
            + $"{{\"name\": \"slots\", \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}"));
    }

    [Test]
    public void QemuSevenDescribesPointerArraysByTheirFirstElement() => Assert.That(
        Fields([VmState.PointerArray<Device, Cell>("slots", Cell.Plain, 6, static d => d.Slots)], VmDescOptions.Qemu72),
        Is.EqualTo($"{{\"name\": \"slots\", \"array_len\": 6, \"type\": \"struct\", \"struct\": {PlainCell}, \"size\": 1}}"));

    /// <summary>A list repeats the keys of its elements in one object (stream 17.20), and the text must still be JSON.</summary>
    [Test]
    public void AListRepeatsItsKeys()
    {
        string text = Fields([VmState.QTailQ<Device, Cell>("list", Cell.Plain, static d => d.List, static _ => new Cell(), 9, since: 1)]);
        string element = PlainCell[1..^1];
        Assert.That(text, Is.EqualTo($"{{\"name\": \"list\", \"type\": \"qtailq\", {element}, {element}, \"size\": 5}}"));
        Assert.DoesNotThrow(() => JsonDocument.Parse(text).Dispose());
    }

    [Test]
    public void SizesAddUpToTheBody()
    {
        VmStateDescription<Device> all = new()
        {
            Name = "dev",
            Fields =
            [
                VmState.UInt32<Device>("a", static d => ref d.A), VmState.Array<Device, uint>("regs", VmStateTypes.UInt32, 3, static d => d.Regs),
                VmState.StructArray<Device, Cell>("cells", Cell.WithSubsection, 2, static d => d.Cells), VmState.PointerArray<Device, Cell>("slots", Cell.Plain, 6, static d => d.Slots),
                VmState.QList<Device, Cell>("list", Cell.Plain, static d => d.List, static _ => new Cell(), 9, since: 1),
            ],
            Subsections = [new() { Name = "dev/sub", Fields = [VmState.UInt32<Device>("b", static d => ref d.B)] }],
        };
        var device = new Device();
        Assert.That(DescribedLength(Describe(all, device)), Is.EqualTo(Save(all, device).Length));
    }

    [Test]
    public void TheBytesDoNotDependOnVmDesc()
    {
        VmStateDescription<Device> description = new() { Name = "dev", Fields = [VmState.PointerArray<Device, Cell>("slots", Cell.Plain, 6, static d => d.Slots)] };
        var section = description.Bind(new Device());
        var desc = new VmDescJson();
        desc.StartObject();
        Assert.That(Save(section, desc), Is.EqualTo(Save(section)));
    }
}
