using System.Text;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Reads the body of a section by its description (stream 2.6) and makes fields with values. Whatever the description says, it reads at most the
/// file's bytes, keeps at most <see cref="WireLimits.ViewerFields"/> fields, and reports each contradiction with its file offset.
/// </summary>
internal sealed class StateReader(QemuFileReader f, Action<long, string> report)
{
    private int _budget = WireLimits.ViewerFields;

    /// <summary>True if fields over the limit were left out.</summary>
    internal bool IsShortened => _budget < 0;

    /// <summary>Reads fields, then subsections: exactly as many bytes as the description adds up to.</summary>
    internal IReadOnlyList<StreamField> Read(DescribedState state)
    {
        if (_budget <= 0)
        {
            _budget = -1;
            f.Skip(state.LengthBytes);
            return [];
        }
        var fields = new List<StreamField>();
        foreach (DescribedField field in state.Fields) fields.Add(ReadField(field));
        foreach (DescribedState sub in state.Subsections) fields.Add(ReadSubsection(sub));
        return fields;
    }

    /// <summary>u8 05, cs name, u32 version, body.</summary>
    private StreamField ReadSubsection(DescribedState sub)
    {
        long at = f.Position;
        byte type = f.ReadByte();
        string name = f.ReadCountedString();
        if (type != (byte)SectionType.Subsection || name != sub.Name)
            throw f.Bad("subsection", $"05 and '{sub.Name}' as in VMDESC", $"0x{type:x2} and '{Printable(name)}'", at);
        uint version = f.ReadUInt32();
        if (version != sub.Version) report(at, $"subsection '{name}': version {version}, VMDESC says {sub.Version}");
        return Group(sub.Name, "subsection", at, Read(sub));
    }

    private StreamField ReadField(DescribedField field)
    {
        long at = f.Position;
        string name = field.Index is { } index ? $"{field.Name}[{index}]" : field.Name;
        if (field.Size == 0 || field.Count == 0) return Group(name, field.Type, at, []);
        if (_budget <= 0 || (field.Nested.Count > 0 && !NestedFits(field)))
        {
            SkipAll(field);
            return new StreamField(name, field.Type, at, f.Position - at, null, []);
        }
        if (field.Nested.Count == 0 && field.Type is not ("qtailq" or "qlist" or "gtree")) return ReadLeaf(field, name);
        if (field.Count == 1) return Group(name, field.Type, at, ReadNested(field));
        var elements = new List<StreamField>();
        for (long i = 0; i < field.Count; i++)
        {
            if (_budget <= 0)
            {
                _budget = -1;
                f.Skip((field.Count - i) * field.Size);
                break;
            }
            long element = f.Position;
            elements.Add(Group($"[{i}]", field.Type, element, ReadNested(field)));
        }
        return Group(name, $"{field.Type}[{field.Count}]", at, elements);
    }

    /// <summary>Skips a field whose parts are unknown or do not add up to its size.</summary>
    private void SkipAll(DescribedField field) => f.Skip(field.Size * field.Count);

    /// <summary>True if the sizes of the nested states add up to the size of one element.</summary>
    private bool NestedFits(DescribedField field)
    {
        long sum = field.NestedBytes;
        bool fits = field.Type switch
        {
            "qtailq" or "qlist" => sum + field.Nested.Count + 1 == field.Size,
            "gtree" => IsTreeSize(field, sum),
            _ => sum == field.Size || sum + 1 == field.Size,
        };
        if (!fits) report(f.Position, $"field '{field.Name}' of type {field.Type}: VMDESC gives it {field.Size} bytes, its parts add up to {sum}");
        return fits;
    }

    /// <summary>A tree is: u32 count, then per node u8 1, a u64 or described key and a value, then u8 0.</summary>
    private static bool IsTreeSize(DescribedField field, long sum)
    {
        long described = field.Nested.Count;
        return 4 + sum + (9 * described) + 1 == field.Size || (described % 2 == 0 && 4 + sum + (described / 2) + 1 == field.Size);
    }

    private List<StreamField> ReadNested(DescribedField field)
    {
        if (field.Type is "qtailq" or "qlist") return ReadList(field);
        if (field.Type == "gtree") return ReadTree(field);
        var fields = new List<StreamField>();
        if (field.NestedBytes + 1 == field.Size) ReadMark(field, 0x31);
        foreach (DescribedState state in field.Nested) fields.AddRange(Read(state));
        return fields;
    }

    private List<StreamField> ReadList(DescribedField field)
    {
        var elements = new List<StreamField>();
        foreach (DescribedState state in field.Nested)
        {
            long at = f.Position;
            ReadMark(field, 1);
            elements.Add(Group($"[{elements.Count}]", state.Name, at, Read(state)));
        }
        ReadMark(field, 0);
        if (field.Nested.Count == 0 && field.Size > 1) f.Skip(field.Size - 1);
        return elements;
    }

    private List<StreamField> ReadTree(DescribedField field)
    {
        long start = f.Position, sum = field.NestedBytes;
        bool directKeys = 4 + sum + (9L * field.Nested.Count) + 1 == field.Size;
        uint count = f.ReadUInt32();
        int nodes = directKeys ? field.Nested.Count : field.Nested.Count / 2;
        if (count != nodes) report(start, $"field '{field.Name}': the tree has {count} nodes, VMDESC describes {nodes}");
        var elements = new List<StreamField>();
        for (int i = 0; i < nodes; i++)
        {
            long at = f.Position;
            ReadMark(field, 1);
            var parts = new List<StreamField>();
            if (directKeys)
            {
                ulong key = f.ReadUInt64();
                parts.Add(new StreamField("key", "uint64", f.Position - 8, 8, key, []));
                parts.AddRange(Read(field.Nested[i]));
            }
            else
            {
                parts.AddRange(Read(field.Nested[2 * i]));
                parts.AddRange(Read(field.Nested[(2 * i) + 1]));
            }
            elements.Add(Group($"[{i}]", "node", at, parts));
        }
        ReadMark(field, 0);
        return elements;
    }

    private void ReadMark(DescribedField field, byte expected)
    {
        long at = f.Position;
        byte mark = f.ReadByte();
        if (mark != expected) report(at, $"field '{field.Name}' of type {field.Type}: expected the mark 0x{expected:x2}, found 0x{mark:x2}");
    }

    private StreamField ReadLeaf(DescribedField field, string name)
    {
        long at = f.Position;
        if (!LeafValue.IsNumber(field.Type, field.Size))
        {
            if (LeafValue.SizeOf(field.Type) is { } size) report(at, $"field '{field.Name}': VMDESC gives type {field.Type} {field.Size} bytes, it has {size}");
            long total = field.Size * field.Count;
            Span<byte> head = stackalloc byte[LeafValue.PreviewBytes];
            head = head[..(int)Math.Min(total, head.Length)];
            f.Read(head);
            f.Skip(total - head.Length);
            _budget--;
            string hex = Convert.ToHexStringLower(head);
            return new StreamField(name, field.Count > 1 ? $"{field.Type}[{field.Count}]" : field.Type, at, total, total > head.Length ? hex + "..." : hex, []);
        }
        if (field.Count == 1) return new StreamField(name, field.Type, at, field.Size, ReadNumber(field), []);
        var values = new List<object>();
        int shown = (int)Math.Min(field.Count, LeafValue.PreviewElements);
        for (int i = 0; i < shown; i++) values.Add(ReadNumber(field));
        if (shown < field.Count) values.Add("...");
        f.Skip((field.Count - shown) * field.Size);
        return new StreamField(name, $"{field.Type}[{field.Count}]", at, f.Position - at, values, []);
    }

    private object ReadNumber(DescribedField field)
    {
        _budget--;
        Span<byte> bytes = stackalloc byte[8];
        bytes = bytes[..(int)field.Size];
        f.Read(bytes);
        return LeafValue.Decode(field.Type, bytes);
    }

    private StreamField Group(string name, string type, long at, IReadOnlyList<StreamField> children)
    {
        _budget--;
        return new StreamField(name, type, at, f.Position - at, null, children);
    }

    private static string Printable(string text) => string.Concat(text.Select(static c => c is < ' ' or > '~' ? '.' : c));
}

/// <summary>Values of the leaf types (stream 2.1).</summary>
internal static class LeafValue
{
    /// <summary>How many bytes of an opaque field are kept.</summary>
    internal const int PreviewBytes = 64;

    /// <summary>How many elements of an array of numbers are kept.</summary>
    internal const int PreviewElements = 64;

    /// <summary>Size in bytes of a type, or null for a type without a fixed size.</summary>
    internal static int? SizeOf(string type) => type switch
    {
        "bool" or "int8" or "uint8" or "uint8 equal" or "nullptr" or "ptr-marker" => 1,
        "int16" or "uint16" or "uint16 equal" => 2,
        "int32" or "uint32" or "int32 equal" or "uint32 equal" or "int32 le" => 4,
        "int64" or "uint64" or "int64 equal" or "timer" or "CPU_Double_U" => 8,
        _ => null,
    };

    /// <summary>True for a numeric type whose size is the given one.</summary>
    internal static bool IsNumber(string type, long size) => SizeOf(type) == size;

    /// <summary>Decodes big-endian bytes.</summary>
    internal static object Decode(string type, ReadOnlySpan<byte> bytes)
    {
        ulong value = 0;
        foreach (byte b in bytes) value = (value << 8) | b;
        int unused = 64 - (8 * bytes.Length);
        return type switch
        {
            "bool" => value != 0,
            "timer" when value == ulong.MaxValue => "not pending",
            "nullptr" or "ptr-marker" => value == 0x30 ? "null" : value == 0x31 ? "present" : $"0x{value:x2}",
            _ when type.StartsWith("int", StringComparison.Ordinal) && type != "int64 equal" => (long)(value << unused) >> unused,
            _ => value,
        };
    }

    /// <summary>Decodes a hex preview that is text followed by zeros; null for any other.</summary>
    internal static string? TextOf(string hex)
    {
        if (hex.Length == 0 || hex.EndsWith("...", StringComparison.Ordinal)) return null;
        string text = Encoding.Latin1.GetString(Convert.FromHexString(hex)).TrimEnd('\0');
        return text.Length > 0 && text.All(static c => c is >= ' ' and <= '~') ? text : null;
    }
}
