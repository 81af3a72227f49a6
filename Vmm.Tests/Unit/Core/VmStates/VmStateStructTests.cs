using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>Nested objects, pointers, lists (stream 2.2, 2.5).</summary>
[TestFixture]
public sealed class VmStateStructTests
{
    internal sealed class Point
    {
        public byte X, Y;
        public byte Z = 0x77;

        public static readonly VmStateDescription<Point> Description = new()
        {
            Name = "point",
            VersionId = 3,
            MinimumVersionId = 1,
            Fields =
            [
                VmState.UInt8<Point>("x", static p => ref p.X), VmState.UInt8<Point>("y", static p => ref p.Y, since: 2),
                VmState.UInt8<Point>("z", static p => ref p.Z, since: 3),
            ],
        };
    }

    internal sealed class Device
    {
        public Point Origin = new() { X = 1, Y = 2, Z = 3 };
        public Point[] Points = [new() { X = 4, Y = 5, Z = 6 }, new() { X = 7, Y = 8, Z = 9 }];
        public Point?[] Slots = [null, new() { X = 1, Y = 1, Z = 1 }, null];
        public List<Point> List = [];
        public byte Count = 1;
        public uint Sum;
    }

    private sealed class SumView(Device device)
    {
        public ushort Low;

        public static readonly VmStateDescription<SumView> Description = new()
        {
            Name = "sum-view",
            VersionId = 2,
            MinimumVersionId = 1,
            Fields = [VmState.UInt16<SumView>("low", static v => ref v.Low, since: 2)],
            PreSave = static v => v.Low = (ushort)v.Device.Sum,
            PostLoad = static (v, version) => v.Device.Sum = (uint)(v.Low + (version << 16)),
        };

        private Device Device => device;
    }

    private static VmStateDescription<Device> Of(params VmStateField<Device>[] fields) => new() { Name = "dev", VersionId = 9, MinimumVersionId = 1, Fields = fields };

    /// <summary>A nested object's version does not depend on the section's version (stream 17.15).</summary>
    [TestCase(1)]
    [TestCase(9)]
    public void AStructCarriesNoVersionAndUsesItsOwn(int sectionVersion)
    {
        VmStateDescription<Device> description = Of(VmState.Struct<Device, Point>("origin", Point.Description, static d => d.Origin));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("010203")));
        Load(description, d, Hex("0a0b0c"), sectionVersion);
        Assert.That((d.Origin.X, d.Origin.Y, d.Origin.Z), Is.EqualTo(((byte)10, (byte)11, (byte)12)));
        Assert.That(Describe(description, d), Does.Contain("{\"name\": \"origin\", \"type\": \"struct\", \"struct\": {\"vmsd_name\": \"point\", \"version\": 3, \"fields\": [").And.EndsWith("]}, \"size\": 3}]}"));
    }

    [Test]
    public void AVStructUsesTheVersionOfItsField()
    {
        VmStateDescription<Device> description = Of(VmState.VStruct<Device, Point>("origin", Point.Description, 2, static d => d.Origin));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("0102")));
        Load(description, d, Hex("0a0b"));
        Assert.That((d.Origin.X, d.Origin.Y, d.Origin.Z), Is.EqualTo(((byte)10, (byte)11, (byte)3)));
        Assert.That(Describe(description, d), Is.EqualTo("""
            {"vmsd_name": "dev", "version": 9, "fields": [{"name": "origin", "type": "vstruct", "vmsd_name": "point", "version": 2, "fields": [{"name": "x", "type": "uint8", "size": 1}, {"name": "y", "type": "uint8", "size": 1}], "size": 2}]}
            """));
    }

    [Test]
    public void ATemporaryIsSavedInItsOwnVersionAndLoadedInTheFields()
    {
        VmStateDescription<Device> description = Of(VmState.WithTmp<Device, SumView>("sum", SumView.Description, static d => new SumView(d), since: 2));
        var d = new Device { Sum = 0x12345 };
        Assert.That(Save(description, d), Is.EqualTo(Hex("2345")));
        Load(description, d, Hex("0007"));
        Assert.That(d.Sum, Is.EqualTo(0x20007));
        Assert.That(Describe(description, d), Does.Contain("\"type\": \"tmp\", \"vmsd_name\": \"sum-view\", \"version\": 2, \"fields\": ["));
    }

    [Test]
    public void AStructArrayIsItsElementsOneAfterAnother()
    {
        VmStateDescription<Device> description = Of(VmState.StructArray<Device, Point>("points", Point.Description, 2, static d => d.Points));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("040506 070809")));
        Load(description, d, Hex("010101 020202"));
        Assert.That(d.Points[1].Z, Is.EqualTo(2));
        Assert.That(Assert.Throws<StreamTruncatedException>(() => Load(description, d, Hex("010101 0202")))!.Message, Does.Contain("'dev/points[1]/z'"));
    }

    [Test]
    public void AVariableStructArrayIsBoundedByItsObjects()
    {
        VmStateDescription<Device> description = Of(VmState.UInt8<Device>("count", static d => ref d.Count),
            VmState.StructVarArray<Device, Point>("points", Point.Description, static d => d.Count, static d => d.Points));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("01 040506")));
        Load(description, d, Hex("02 010101 020202"));
        Assert.That((d.Count, d.Points[1].X), Is.EqualTo(((byte)2, (byte)2)));
        Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("03 010101 020202 030303")));
    }

    [Test]
    public void AnAllocatedStructArrayIsMadeToMeasure()
    {
        VmStateDescription<Device> description = Of(VmState.UInt8<Device>("count", static d => ref d.Count),
            VmState.StructVarArrayAlloc<Device, Point>("points", Point.Description, static d => d.Count, 3, static _ => new Point(), static d => ref d.Points));
        var d = new Device();
        Load(description, d, Hex("03 010101 020202 030303"));
        Assert.That(d.Points.Select(static p => p.X), Is.EqualTo(new byte[] { 1, 2, 3 }));
        Assert.That(Save(description, d), Is.EqualTo(Hex("03 010101 020202 030303")));
        Point[] before = d.Points;
        Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("04 010101")));
        Assert.That(d.Points, Is.SameAs(before));
    }

    [Test]
    public void AMissingPointerIsOneMarkerByteAndAPresentOneHasNone()
    {
        VmStateDescription<Device> description = Of(VmState.PointerArray<Device, Point>("slots", Point.Description, 3, static d => d.Slots));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("30 010101 30")));
        Load(description, d, Hex("30 050607 30"));
        Assert.That(d.Slots[1]!.Z, Is.EqualTo(7));
        var error = Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("31 050607 30")));
        Assert.That(error!.Message, Does.Contain("'dev/slots[0]'").And.Contain("0x30").And.Contain("0x31"));
    }

    [Test]
    public void AnAutoAllocatedPointerArrayTellsOfEachElement()
    {
        VmStateDescription<Device> description = Of(VmState.PointerArrayAutoAlloc<Device, Point>("slots", Point.Description, 3, static _ => new Point(), static d => d.Slots));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("30 31010101 30")));
        Load(description, d, Hex("31 050607 30 30"));
        Assert.That(d.Slots.Select(static s => s?.X), Is.EqualTo(new byte?[] { 5, null, null }));
        Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("00 30 30")));
        Assert.That(DescribedLength(Describe(description, new Device())), Is.EqualTo(6));
    }

    [TestCase("qtailq")]
    [TestCase("qlist")]
    public void AListIsElementsBehindOnesUpToAZero(string type)
    {
        VmStateDescription<Device> description = Of(type == "qtailq"
            ? VmState.QTailQ<Device, Point>("list", Point.Description, static d => d.List, static _ => new Point(), max: 3, since: 3)
            : VmState.QList<Device, Point>("list", Point.Description, static d => d.List, static _ => new Point(), max: 3, since: 3));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("00")));
        d.List.AddRange([new Point { X = 1, Y = 2, Z = 3 }, new Point { X = 4, Y = 5, Z = 6 }]);
        Assert.That(Save(description, d), Is.EqualTo(Hex("01 010203 01 040506 00")));
        Load(description, d, Hex("01 090909 00"));
        Assert.That(d.List.Select(static p => p.X), Is.EqualTo(new byte[] { 9 }), "a load replaces the list");
        Load(description, d, Hex("01 010101 01 020202 01 030303 00"));
        Assert.That(d.List.Select(static p => p.X), Is.EqualTo(new byte[] { 1, 2, 3 }), "a load keeps the order");
        Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("01 010101 01 020202 01 030303 01 040404 00")));
        Assert.That(d.List, Has.Count.EqualTo(3), "a list longer than the device's limit changes nothing");
    }

    [Test]
    public void AListLoadsInTheVersionOfItsField()
    {
        VmStateDescription<Device> description = Of(VmState.QTailQ<Device, Point>("list", Point.Description, static d => d.List, static _ => new Point(), max: 3, since: 1));
        var d = new Device();
        Load(description, d, Hex("01 05 00"));
        Assert.That((d.List[0].X, d.List[0].Z), Is.EqualTo(((byte)5, (byte)0x77)));
        VmStateDescription<Device> tooNew = Of(VmState.QTailQ<Device, Point>("list", Point.Description, static d => d.List, static _ => new Point(), max: 3, since: 4));
        Assert.Throws<IncompatibleStateException>(() => Load(tooNew, d, Hex("00")));
    }
}
