using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>The wire form of every leaf type (stream 2.1).</summary>
[TestFixture]
public sealed class VmStateTypeTests
{
    private sealed class Leaves
    {
        public bool Yes = true, No;
        public sbyte I8 = -2;
        public short I16 = -3;
        public int I32 = -4;
        public long I64 = -5;
        public byte U8 = 0x81;
        public ushort U16 = 0x8283;
        public uint U32 = 0x84858687;
        public ulong U64 = 0x88898a8b8c8d8e8f;
        public long Pending = 0x0102030405060708, Idle = -1;
        public ulong Real = 0x3ff0000000000001;

        public static readonly VmStateDescription<Leaves> Description = new()
        {
            Name = "leaves",
            Fields =
            [
                VmState.Bool<Leaves>("yes", static d => ref d.Yes), VmState.Bool<Leaves>("no", static d => ref d.No),
                VmState.Int8<Leaves>("i8", static d => ref d.I8), VmState.Int16<Leaves>("i16", static d => ref d.I16),
                VmState.Int32<Leaves>("i32", static d => ref d.I32), VmState.Int64<Leaves>("i64", static d => ref d.I64),
                VmState.UInt8<Leaves>("u8", static d => ref d.U8), VmState.UInt16<Leaves>("u16", static d => ref d.U16),
                VmState.UInt32<Leaves>("u32", static d => ref d.U32), VmState.UInt64<Leaves>("u64", static d => ref d.U64),
                VmState.Timer<Leaves>("pending", static d => ref d.Pending), VmState.Timer<Leaves>("idle", static d => ref d.Idle),
                VmState.CpuDouble<Leaves>("real", static d => ref d.Real), VmState.Unused<Leaves>(3),
            ],
        };
    }

    private sealed class Checked
    {
        public byte U8 = 1;
        public ushort U16 = 2;
        public int I32 = -3;
        public uint U32 = 4;
        public ulong U64 = 0x8000000000000005;
        public int Limit = 7;
    }

    private static readonly byte[] s_leaves = Hex("""
        01 00 fe fffd fffffffc fffffffffffffffb
        81 8283 84858687 88898a8b8c8d8e8f
        0102030405060708 ffffffffffffffff 3ff0000000000001 000000
        """.Replace("\n", " "));

    [Test]
    public void EveryLeafTypeHasItsWireForm() => Assert.That(Save(Leaves.Description, new Leaves()), Is.EqualTo(s_leaves));

    [Test]
    public void EveryLeafTypeLoadsFromItsWireForm()
    {
        var empty = new Leaves { Yes = false, No = true, I8 = 0, I16 = 0, I32 = 0, I64 = 0, U8 = 0, U16 = 0, U32 = 0, U64 = 0, Pending = -1, Idle = 5, Real = 0 };
        Load(Leaves.Description, empty, s_leaves);
        Assert.That(Save(Leaves.Description, empty), Is.EqualTo(s_leaves));
        Assert.That(empty.Idle, Is.EqualTo(-1), "all ones means that the timer is not pending");
    }

    [Test]
    public void ReadsInSingleBytesGiveTheSame()
    {
        var empty = new Leaves { U64 = 0 };
        Load(Leaves.Description.Bind(empty), s_leaves, inSingleBytes: true);
        Assert.That(Save(Leaves.Description, empty), Is.EqualTo(s_leaves));
    }

    [Test]
    public void VmDescNamesTheTypesAsQemuDoes()
    {
        Assert.That(Describe(Leaves.Description, new Leaves()), Is.EqualTo("""
            {"vmsd_name": "leaves", "version": 1, "fields": [{"name": "yes", "type": "bool", "size": 1}, {"name": "no", "type": "bool", "size": 1}, 
            {"name": "i8", "type": "int8", "size": 1}, {"name": "i16", "type": "int16", "size": 2}, {"name": "i32", "type": "int32", "size": 4}, 
            {"name": "i64", "type": "int64", "size": 8}, {"name": "u8", "type": "uint8", "size": 1}, {"name": "u16", "type": "uint16", "size": 2}, 
            {"name": "u32", "type": "uint32", "size": 4}, {"name": "u64", "type": "uint64", "size": 8}, {"name": "pending", "type": "timer", "size": 8}, 
            {"name": "idle", "type": "timer", "size": 8}, {"name": "real", "type": "CPU_Double_U", "size": 8}, 
            {"name": "unused", "type": "unused_buffer", "size": 3}]}
            """.Replace("\n", "")));
    }

    [Test]
    public void AnyNonZeroByteIsTrue()
    {
        var d = new Checked { I32 = 0 };
        var flag = new Leaves { Yes = false };
        VmStateDescription<Leaves> one = new() { Name = "b", Fields = [VmState.Bool<Leaves>("yes", static l => ref l.Yes)] };
        Load(one, flag, [0x80]);
        Assert.That(flag.Yes, Is.True);
        Assert.That(Save(one, flag), Is.EqualTo(new byte[] { 1 }));
        Assert.That(d.I32, Is.Zero);
    }

    [TestCase("uint8 equal", "01", "02")]
    [TestCase("uint16 equal", "0002", "0003")]
    [TestCase("int32 equal", "fffffffd", "00000003")]
    [TestCase("uint32 equal", "00000004", "00000005")]
    [TestCase("int64 equal", "8000000000000005", "8000000000000006")]
    public void AnEqualFieldLoadsOnlyTheLocalValue(string type, string same, string other)
    {
        var d = new Checked();
        VmStateField<Checked> field = type switch
        {
            "uint8 equal" => VmState.UInt8Equal<Checked>("f", static c => ref c.U8),
            "uint16 equal" => VmState.UInt16Equal<Checked>("f", static c => ref c.U16),
            "int32 equal" => VmState.Int32Equal<Checked>("f", static c => ref c.I32),
            "uint32 equal" => VmState.UInt32Equal<Checked>("f", static c => ref c.U32),
            _ => VmState.UInt64Equal<Checked>("f", static c => ref c.U64),
        };
        VmStateDescription<Checked> description = new() { Name = "c", Fields = [field] };
        Assert.That(field.TypeName, Is.EqualTo(type));
        Assert.That(Save(description, d), Is.EqualTo(Hex(same)));
        Load(description, d, Hex(same));
        var error = Assert.Throws<StreamFormatException>(() => Load(description, d, Hex(other)));
        Assert.That(error!.Message, Does.Contain("'c/f'").And.Contain("the local value"));
        Assert.That(error.Offset, Is.Zero, "the error names the offset of the value, not the one behind it");
        Assert.That(Save(description, d), Is.EqualTo(Hex(same)), "a refused value must not change the field");
    }

    /// <summary>In "int32 le", "le" means less-or-equal; the value is big-endian (stream 17.16).</summary>
    [TestCase("00000000", true)]
    [TestCase("00000007", true)]
    [TestCase("00000008", false)]
    [TestCase("ffffffff", false)]
    [TestCase("07000000", false)]
    public void Int32LeIsBoundedByTheLocalValue(string hex, bool loads)
    {
        var d = new Checked();
        VmStateDescription<Checked> description = new() { Name = "c", Fields = [VmState.Int32LessEqual<Checked>("n", static c => ref c.Limit)] };
        Assert.That(description.Fields[0].TypeName, Is.EqualTo("int32 le"));
        if (loads)
        {
            Load(description, d, Hex(hex));
            Assert.That(Save(description, d), Is.EqualTo(Hex(hex)));
        }
        else Assert.Throws<StreamFormatException>(() => Load(description, d, Hex(hex)));
    }

    [Test]
    public void ATimerBeforeTheEpochIsRefused()
    {
        VmStateDescription<Leaves> description = new() { Name = "t", Fields = [VmState.Timer<Leaves>("t", static l => ref l.Pending)] };
        var error = Assert.Throws<StreamFormatException>(() => Load(description, new Leaves(), Hex("fffffffffffffffe")));
        Assert.That(error!.Found, Is.EqualTo("0xfffffffffffffffe"));
    }

    [Test]
    public void ADeviceCanBringATypeOfItsOwn()
    {
        var type = new VmStateType<uint>("u24", 4, static (f, v) => { f.WriteByte((byte)(v >> 16)); f.WriteUInt16((ushort)v); },
            static f => (uint)(f.ReadByte() << 16 | f.ReadUInt16()));
        VmStateDescription<Checked> description = new() { Name = "c", Fields = [VmState.Single<Checked, uint>("v", type, static c => ref c.U32)] };
        var d = new Checked { U32 = 0x123456 };
        Assert.That(Save(description, d), Is.EqualTo(Hex("123456")));
        Load(description, d, Hex("654321"));
        Assert.That(d.U32, Is.EqualTo(0x654321));
        Assert.That(Describe(description, d), Does.Contain("\"type\": \"u24\", \"size\": 3"));
    }
}
