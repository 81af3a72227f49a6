using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>Presence, arrays, buffers (stream 2.2, 2.3).</summary>
[TestFixture]
public sealed class VmStateFieldTests
{
    private sealed class Device
    {
        public uint A = 1, B = 2, C = 3;
        public bool HasB = true;
        public ushort[] Table = [0x10, 0x20, 0x30, 0x40];
        public long Count = 2;
        public byte[] Bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        public ulong[] Bits = [0x8000000000000001, 2];
    }

    private static VmStateDescription<Device> Of(params VmStateField<Device>[] fields) => new() { Name = "dev", VersionId = 5, MinimumVersionId = 1, Fields = fields };

    private static readonly VmStateField<Device> s_table =
        VmState.Array<Device, ushort>("table", VmStateTypes.UInt16, 4, static d => d.Table);

    [TestCase(1, "0000000a")]
    [TestCase(2, "0000000a 0000000b")]
    [TestCase(4, "0000000a 0000000b")]
    [TestCase(5, "0000000a 0000000b 0000000c")]
    public void AFieldIsThereFromItsVersionOn(int version, string hex)
    {
        VmStateDescription<Device> description = Of(VmState.UInt32<Device>("a", static d => ref d.A), VmState.UInt32<Device>("b", static d => ref d.B, since: 2),
            VmState.UInt32<Device>("c", static d => ref d.C, since: 5));
        var d = new Device();
        Load(description, d, Hex(hex), version);
        Assert.That((d.A, d.B, d.C), Is.EqualTo((10u, version >= 2 ? 11u : 2u, version >= 5 ? 12u : 3u)));
        Assert.That(Save(description, d), Has.Length.EqualTo(12), "saving always uses the local version");
    }

    [Test]
    public void APredicateDecidesAloneAndSeesTheIncomingVersion()
    {
        int seen = 0;
        // The version would leave the field out and the predicate includes it; the predicate wins.
        VmStateDescription<Device> description = Of(VmState.UInt32<Device>("b", static d => ref d.B, since: 99, exists: (d, v) => { seen = v; return d.HasB; }));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("00000002")));
        Assert.That(seen, Is.EqualTo(5));
        Load(description, d, Hex("00000009"), version: 3);
        Assert.That((seen, d.B), Is.EqualTo((3, 9u)));
        d.HasB = false;
        Assert.That(Save(description, d), Is.Empty);
    }

    [TestCase(6, "too new", "version 5 or older")]
    [TestCase(0, "too old", "version 1 or newer")]
    public void AVersionOutsideTheRangeIsRefusedBeforeAnyHook(int version, string what, string expected)
    {
        VmStateDescription<Device> description = new() { Name = "dev", VersionId = 5, PreLoad = static _ => Assert.Fail("pre_load ran") };
        var error = Assert.Throws<IncompatibleStateException>(() => Load(description, new Device(), [], version));
        Assert.That(error!.Message, Does.Contain(what).And.Contain("'dev/0'"));
        Assert.That((error.Expected, error.Found), Is.EqualTo((expected, $"version {version}")));
    }

    [Test]
    public void AnArrayHasNoCountOnTheWire()
    {
        var d = new Device();
        Assert.That(Save(Of(s_table), d), Is.EqualTo(Hex("0010 0020 0030 0040")));
        Load(Of(s_table), d, Hex("0001 0002 0003 0004"));
        Assert.That(d.Table, Is.EqualTo(new ushort[] { 1, 2, 3, 4 }));
    }

    [Test]
    public void ASliceSendsOnlyItself()
    {
        VmStateDescription<Device> description = Of(VmState.Array<Device, ushort>("table", VmStateTypes.UInt16, 2, static d => d.Table.AsSpan(1, 2)),
            VmState.Buffer<Device>("bytes", 3, static d => d.Bytes.AsSpan(4, 3)));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("0020 0030 050607")));
        Load(description, d, Hex("aaaa bbbb 0a0b0c"));
        Assert.That(d.Table, Is.EqualTo(new ushort[] { 0x10, 0xaaaa, 0xbbbb, 0x40 }));
        Assert.That(d.Bytes, Is.EqualTo(new byte[] { 1, 2, 3, 4, 10, 11, 12, 8 }));
    }

    [TestCase(0, "")]
    [TestCase(1, "0010")]
    [TestCase(4, "0010 0020 0030 0040")]
    public void AVariableArraySendsAsManyAsItsMemberSays(long count, string hex) =>
        Assert.That(Save(Of(VmState.VarArray<Device, ushort>("t", VmStateTypes.UInt16, static d => d.Count, static d => d.Table)), new Device { Count = count }), Is.EqualTo(Hex(hex)));

    private sealed class Counted
    {
        public int Count;
        public uint[] Values = new uint[4];
        public byte[] Bytes = new byte[4];
        public ulong[] Bits = new ulong[1];
    }

    private static IEnumerable<TestCaseData> CountedFields()
    {
        yield return new TestCaseData(VmState.VarArray<Counted, uint>("v", VmStateTypes.UInt32, static c => c.Count, static c => c.Values), 4, 4).SetArgDisplayNames("VarArray");
        yield return new TestCaseData(VmState.VarArrayAlloc<Counted, uint>("v", VmStateTypes.UInt32, static c => c.Count, 6, static c => ref c.Values), 6, 4).SetArgDisplayNames("VarArrayAlloc");
        yield return new TestCaseData(VmState.VBuffer<Counted>("v", static c => c.Count, static c => c.Bytes), 4, 1).SetArgDisplayNames("VBuffer");
        yield return new TestCaseData(VmState.VBufferAlloc<Counted>("v", static c => c.Count, 9, static c => ref c.Bytes), 9, 1).SetArgDisplayNames("VBufferAlloc");
    }

    [TestCaseSource(nameof(CountedFields))]
    public void ACountIsBoundedByTheTargetBeforeAnythingIsAllocated(object field, int max, int bytesEach)
    {
        VmStateDescription<Counted> description = new() { Name = "dev", Fields = [VmState.Int32<Counted>("count", static c => ref c.Count), (VmStateField<Counted>)field] };
        var d = new Counted();
        byte[] fits = [.. BitConverter.GetBytes(max).Reverse(), .. Enumerable.Repeat((byte)0x5a, max * bytesEach)];
        Load(description, d, fits);
        Assert.That(Save(description, d), Is.EqualTo(fits));
        foreach (int bad in new[] { max + 1, -1, WireLimits.VmStateElements })
        {
            var error = Assert.Throws<StreamFormatException>(() => Load(description, new Counted(), [.. BitConverter.GetBytes(bad).Reverse(), .. new byte[64]]));
            Assert.That(error!.Message, Does.Contain("'dev/v'"));
            Assert.That((error.Offset, error.Found), Is.EqualTo((4L, $"{bad}")));
        }
        var limit = Assert.Throws<StreamLimitException>(() => Load(description, new Counted(), [.. BitConverter.GetBytes(WireLimits.VmStateElements + 1).Reverse(), .. new byte[64]]));
        Assert.That(limit!.Message, Does.Contain("WireLimits.VmStateElements").And.Contain("'dev/v'"));
    }

    [Test]
    public void ACountThatTheDeviceItselfGotWrongStopsTheSave()
    {
        VmStateDescription<Counted> description = new() { Name = "dev", Fields = [VmState.VarArray<Counted, uint>("v", VmStateTypes.UInt32, static c => c.Count, static c => c.Values)] };
        Assert.That(Assert.Throws<DeviceStateException>(() => Save(description, new Counted { Count = 5 }))!.Message, Does.Contain("'dev/v'").And.Contain("found 5"));
    }

    [Test]
    public void ABitmapIsWholeWordsOfItsBits()
    {
        VmStateDescription<Device> description = Of(VmState.Bitmap<Device>("bits", static d => d.Count, static d => d.Bits));
        Assert.That(Save(description, new Device { Count = 1 }), Is.EqualTo(Hex("8000000000000001")));
        Assert.That(Save(description, new Device { Count = 64 }), Is.EqualTo(Hex("8000000000000001")));
        Assert.That(Save(description, new Device { Count = 65 }), Is.EqualTo(Hex("8000000000000001 0000000000000002")));
        var d = new Device { Count = 65 };
        Load(description, d, Hex("0000000000000004 0000000000000001"));
        Assert.That(d.Bits, Is.EqualTo(new ulong[] { 4, 1 }));
        Assert.Throws<StreamFormatException>(() => Load(description, new Device { Count = 129 }, new byte[64]));
        Assert.That(Describe(description, new Device { Count = 65 }), Does.Contain("{\"name\": \"bits\", \"type\": \"bitmap\", \"size\": 16}"));
    }

    [Test]
    public void AValidationCostsNoBytesAndStopsBothDirections()
    {
        VmStateDescription<Device> description = Of(VmState.UInt32<Device>("a", static d => ref d.A), VmState.Validate<Device>("a is small", static (d, _) => d.A < 100));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo(Hex("00000001")));
        Assert.That(Describe(description, d), Does.Not.Contain("a is small"));
        Assert.That(Assert.Throws<StreamFormatException>(() => Load(description, d, Hex("00000064")))!.Message, Does.Contain("'dev/a is small'"));
        Assert.That(Assert.Throws<DeviceStateException>(() => Save(description, d))!.Message, Does.Contain("'dev/a is small'"));
    }

    [Test]
    public void UnusedBytesAreWrittenAsZeroAndReadAsAnything()
    {
        VmStateDescription<Device> description = Of(VmState.Unused<Device>(5000), VmState.UInt32<Device>("a", static d => ref d.A));
        var d = new Device();
        Assert.That(Save(description, d), Is.EqualTo((byte[])[.. new byte[5000], 0, 0, 0, 1]));
        Load(description, d, [.. Enumerable.Repeat((byte)0xff, 5000), 0, 0, 0, 7]);
        Assert.That(d.A, Is.EqualTo(7));
    }

    [Test]
    public void AnErrorNamesSectionPathOffsetExpectedAndFound()
    {
        VmStateDescription<Device> description = Of(s_table, VmState.UInt32Equal<Device>("a", static d => ref d.A));
        var error = Assert.Throws<StreamFormatException>(() => Load(description, new Device(), Hex("0010002000300040 00000009")));
        Assert.That(error!.Message, Is.EqualTo("section 'dev/0', offset 8: field 'dev/a': expected 1, the local value, found 9"));
        Assert.That((error.Section, error.Offset, error.Expected, error.Found), Is.EqualTo(("dev/0", 8L, "1, the local value", "9")));
    }

    [Test]
    public void ATruncatedFieldIsNamedWithItsElement()
    {
        var error = Assert.Throws<StreamTruncatedException>(() => Load(Of(s_table), new Device(), Hex("0010 0020 00")));
        Assert.That(VmmException.Describe(error!), Does.Contain("field 'dev/table[2]'").And.Contain("section 'dev/0'").And.Contain("offset 5"));
    }
}
