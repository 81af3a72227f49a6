using Vmm.Core.Wire;

namespace Vmm.Core.VmStates;

/// <summary>Reads one value. On entry the value holds the local one, which types that compare need.</summary>
/// <param name="loader">Supplies the stream and makes errors.</param>
/// <param name="value">The local value on entry, the loaded one on return.</param>
internal delegate void VmStateGet<TValue>(VmStateLoader loader, ref TValue value);

/// <summary>The wire format of one value (QEMU: <c>VMStateInfo</c>). Devices may define their own. Immutable.</summary>
public sealed class VmStateType<TValue>
{
    private readonly Action<QemuFileWriter, TValue> _put;
    private readonly VmStateGet<TValue> _get;

    /// <summary>Declares a type. Both delegates are called with the BQL held and must read exactly what the other one writes.</summary>
    /// <param name="name">Name in VMDESC, e.g. <c>u24</c>.</param>
    /// <param name="sizeBytes">Size of the value in memory; the wire may have more or fewer bytes.</param>
    /// <param name="put">Writes one value at the stream's position.</param>
    /// <param name="get">Reads one value; it refuses a bad one with <see cref="QemuFileReader.Bad"/>.</param>
    public VmStateType(string name, int sizeBytes, Action<QemuFileWriter, TValue> put, Func<QemuFileReader, TValue> get)
        : this(name, sizeBytes, put, (VmStateLoader loader, ref TValue value) => value = get(loader.File))
    {
    }

    internal VmStateType(string name, int sizeBytes, Action<QemuFileWriter, TValue> put, VmStateGet<TValue> get) =>
        (Name, SizeBytes, _put, _get) = (name, sizeBytes, put, get);

    /// <summary>Name in VMDESC.</summary>
    public string Name { get; }

    /// <summary>Bytes in memory.</summary>
    public int SizeBytes { get; }

    internal void Put(QemuFileWriter f, TValue value) => _put(f, value);

    internal void Get(VmStateLoader loader, ref TValue value) => _get(loader, ref value);
}

/// <summary>The leaf types (stream 2.1). Integers are big-endian on the wire, even where QEMU's name says otherwise.</summary>
public static class VmStateTypes
{
    /// <summary>One byte; written as 0 or 1, any other value reads as true.</summary>
    public static VmStateType<bool> Bool { get; } = new("bool", 1, static (f, v) => f.WriteBool(v), static (l, ref v) => v = l.File.ReadBool());

    /// <summary>i8.</summary>
    public static VmStateType<sbyte> Int8 { get; } = new("int8", 1, static (f, v) => f.WriteByte((byte)v), static (l, ref v) => v = (sbyte)l.File.ReadByte());

    /// <summary>i16.</summary>
    public static VmStateType<short> Int16 { get; } = new("int16", 2, static (f, v) => f.WriteUInt16((ushort)v), static (l, ref v) => v = (short)l.File.ReadUInt16());

    /// <summary>i32.</summary>
    public static VmStateType<int> Int32 { get; } = new("int32", 4, static (f, v) => f.WriteInt32(v), static (l, ref v) => v = l.File.ReadInt32());

    /// <summary>i64.</summary>
    public static VmStateType<long> Int64 { get; } = new("int64", 8, static (f, v) => f.WriteInt64(v), static (l, ref v) => v = l.File.ReadInt64());

    /// <summary>u8.</summary>
    public static VmStateType<byte> UInt8 { get; } = new("uint8", 1, static (f, v) => f.WriteByte(v), static (l, ref v) => v = l.File.ReadByte());

    /// <summary>u16.</summary>
    public static VmStateType<ushort> UInt16 { get; } = new("uint16", 2, static (f, v) => f.WriteUInt16(v), static (l, ref v) => v = l.File.ReadUInt16());

    /// <summary>u32.</summary>
    public static VmStateType<uint> UInt32 { get; } = new("uint32", 4, static (f, v) => f.WriteUInt32(v), static (l, ref v) => v = l.File.ReadUInt32());

    /// <summary>u64.</summary>
    public static VmStateType<ulong> UInt64 { get; } = new("uint64", 8, static (f, v) => f.WriteUInt64(v), static (l, ref v) => v = l.File.ReadUInt64());

    /// <summary>u8 that must equal the local value.</summary>
    public static VmStateType<byte> UInt8Equal { get; } = Equal("uint8 equal", UInt8);

    /// <summary>u16 that must equal the local value.</summary>
    public static VmStateType<ushort> UInt16Equal { get; } = Equal("uint16 equal", UInt16);

    /// <summary>i32 that must equal the local value.</summary>
    public static VmStateType<int> Int32Equal { get; } = Equal("int32 equal", Int32);

    /// <summary>u32 that must equal the local value.</summary>
    public static VmStateType<uint> UInt32Equal { get; } = Equal("uint32 equal", UInt32);

    /// <summary>u64 that must equal the local value. QEMU misnames it, and the name is part of VMDESC, so this product keeps it.</summary>
    public static VmStateType<ulong> UInt64Equal { get; } = Equal("int64 equal", UInt64);

    /// <summary>i32 from 0 to the local value; "le" stands for less-or-equal, not for little-endian (QEMU: VMSTATE_INT32_POSITIVE_LE).</summary>
    public static VmStateType<int> Int32LessEqual { get; } = new("int32 le", 4, static (f, v) => f.WriteInt32(v), static (l, ref v) =>
    {
        long at = l.File.Position;
        int found = l.File.ReadInt32();
        if (found < 0 || found > v) throw l.Bad(at, $"0 to {v}", $"{found}");
        v = found;
    });

    /// <summary>Expiry of a timer in ns of its clock; -1 if the timer is not pending (QEMU: VMSTATE_TIMER_PTR).</summary>
    public static VmStateType<long> Timer { get; } = new("timer", 8, static (f, v) => f.WriteInt64(v), static (l, ref v) =>
    {
        long at = l.File.Position;
        long found = l.File.ReadInt64();
        if (found < -1) throw l.Bad(at, "an expiry of 0 or later, or all ones", $"0x{found:x16}");
        v = found;
    });

    /// <summary>u32 high half, u32 low half (QEMU: CPU_DoubleU).</summary>
    public static VmStateType<ulong> CpuDouble { get; } = new("CPU_Double_U", 8, static (f, v) => f.WriteUInt64(v), static (l, ref v) => v = l.File.ReadUInt64());

    private static VmStateType<TValue> Equal<TValue>(string name, VmStateType<TValue> plain) where TValue : IEquatable<TValue> =>
        new(name, plain.SizeBytes, plain.Put, (l, ref v) =>
        {
            long at = l.File.Position;
            TValue found = v;
            plain.Get(l, ref found);
            if (!found.Equals(v)) throw l.Bad(at, $"{v}, the local value", $"{found}");
        });
}
