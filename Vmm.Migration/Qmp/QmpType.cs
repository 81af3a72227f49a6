using System.Text.Json;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;

namespace Vmm.Migration.Qmp;

/// <summary>
/// A QAPI type. One declaration checks arguments and makes the schema (qmp 3 and 6), so the two always agree. Immutable.
/// </summary>
internal abstract class QmpType
{
    internal static readonly QmpType Str = new QmpScalar("str", "string", JsonValueKind.String);
    internal static readonly QmpType Bool = new QmpScalar("bool", "boolean", JsonValueKind.True, JsonValueKind.False);
    internal static readonly QmpType Number = new QmpScalar("number", "number", JsonValueKind.Number);
    internal static readonly QmpType Null = new QmpScalar("null", "null", JsonValueKind.Null);
    internal static readonly QmpType Any = new QmpAny();
    internal static readonly QmpType Int = new QmpInteger(null, long.MinValue, long.MaxValue);
    internal static readonly QmpType UInt64 = new QmpInteger(null, 0, ulong.MaxValue);
    internal static readonly QmpType UInt32 = new QmpInteger("uint32_t", 0, uint.MaxValue);
    internal static readonly QmpType UInt16 = new QmpInteger("uint16_t", 0, ushort.MaxValue);
    internal static readonly QmpType UInt8 = new QmpInteger("uint8_t", 0, byte.MaxValue);

    /// <summary>
    /// Throws QEMU's error unless the value has this type. Some errors show the member's name, others its path from the arguments, e.g.
    /// <c>channels[0].addr</c>.
    /// </summary>
    internal abstract void Check(JsonNode? value, string name, string path);

    /// <summary>Builds the schema entity; <paramref name="nameOf"/> names a type that the entity uses, and queues that type for the schema.</summary>
    internal abstract JsonObject Describe(Func<QmpType, string> nameOf);

    /// <summary>The type's name in the schema, or null for a type that gets a number as its name.</summary>
    internal virtual string? SchemaName => null;

    protected static JsonValueKind KindOf(JsonNode? value) => value?.GetValueKind() ?? JsonValueKind.Null;

    protected static QmpErrorException WrongType(string path, string expected) => new($"Invalid parameter type for '{path}', expected: {expected}");
}

/// <summary>A JSON scalar.</summary>
internal sealed class QmpScalar(string name, string jsonType, params JsonValueKind[] kinds) : QmpType
{
    internal override string SchemaName => name;

    internal override void Check(JsonNode? value, string name, string path)
    {
        if (Array.IndexOf(kinds, KindOf(value)) < 0) throw WrongType(path, jsonType);
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new() { ["json-type"] = jsonType, ["meta-type"] = "builtin" };
}

/// <summary>Any JSON value.</summary>
internal sealed class QmpAny : QmpType
{
    internal override string SchemaName => "any";

    internal override void Check(JsonNode? value, string name, string path)
    {
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new() { ["json-type"] = "value", ["meta-type"] = "builtin" };
}

/// <summary>An integer, called <c>int</c> in the schema at any width. Refuses a negative number for an unsigned type, where QEMU wraps it (qmp 3).</summary>
internal sealed class QmpInteger(string? cName, long min, ulong max) : QmpType
{
    internal override string SchemaName => "int";

    internal override void Check(JsonNode? value, string name, string path)
    {
        Int128 n = 0;
        bool ok = KindOf(value) == JsonValueKind.Number && Int128.TryParse(value!.ToJsonString(), System.Globalization.NumberStyles.AllowLeadingSign, null, out n);
        if (min < 0)
        {
            if (!ok || n < min || n > max) throw WrongType(path, "integer");
            return;
        }
        if (!ok || n < 0 || n > ulong.MaxValue) throw new QmpErrorException($"Parameter '{path}' expects uint64");
        if (n > max) throw new QmpErrorException($"Parameter '{name}' expects {cName}");
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new() { ["json-type"] = "int", ["meta-type"] = "builtin" };
}

/// <summary>One of a list of words.</summary>
internal sealed class QmpEnum(params IReadOnlyList<string> values) : QmpType
{
    internal IReadOnlyList<string> Values => values;

    internal override void Check(JsonNode? value, string name, string path)
    {
        if (KindOf(value) != JsonValueKind.String) throw WrongType(path, "string");
        string text = value!.GetValue<string>();
        if (!values.Contains(text)) throw new QmpErrorException($"Parameter '{name}' does not accept value '{text}'");
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new()
    {
        ["members"] = new JsonArray([.. values.Select(static v => new JsonObject { ["name"] = v })]),
        ["meta-type"] = "enum",
        ["values"] = new JsonArray([.. values.Select(static v => JsonValue.Create(v))]),
    };
}

/// <summary>A list.</summary>
internal sealed class QmpArray(QmpType element) : QmpType
{
    internal QmpType Element => element;

    internal override void Check(JsonNode? value, string name, string path)
    {
        if (value is not JsonArray array) throw WrongType(path, "array");
        for (int i = 0; i < array.Count; i++) element.Check(array[i], $"{path}[{i}]", $"{path}[{i}]");
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new() { ["element-type"] = nameOf(element), ["meta-type"] = "array" };
}

/// <summary>A value of one of several types, told apart by their JSON kind.</summary>
internal sealed class QmpAlternate(string expected, params IReadOnlyList<QmpType> types) : QmpType
{
    internal override void Check(JsonNode? value, string name, string path)
    {
        foreach (QmpType type in types)
        {
            try
            {
                type.Check(value, name, path);
                return;
            }
            catch (QmpErrorException)
            {
                // Try the next type; the error below names the types that are accepted.
            }
        }
        throw WrongType(path, expected);
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf) => new()
    {
        ["members"] = new JsonArray([.. types.Select(t => new JsonObject { ["type"] = nameOf(t) })]),
        ["meta-type"] = "alternate",
    };
}

/// <summary>A member of an object. A hidden member is accepted, but the schema leaves it out.</summary>
internal sealed record QmpMember(string Name, QmpType Type, bool Optional = false, bool Hidden = false);

/// <summary>An object. With a tag member it is a flat union, whose variants add members.</summary>
internal sealed class QmpObject(params IReadOnlyList<QmpMember> members) : QmpType
{
    internal static readonly QmpObject Empty = new();

    internal IReadOnlyList<QmpMember> Members => members;

    /// <summary>Name of the enum member that selects the variant, or null.</summary>
    internal string? Tag { get; init; }

    /// <summary>Members added by each value of the tag; a value not listed adds none.</summary>
    internal IReadOnlyDictionary<string, QmpObject> Variants { get; init; } = new Dictionary<string, QmpObject>();

    internal override void Check(JsonNode? value, string name, string path)
    {
        if (value is not JsonObject o) throw WrongType(path, "object");
        var known = new HashSet<string>();
        CheckMembers(o, path, known);
        // As in QEMU, a missing or wrong member is reported before an unexpected one.
        string? extra = o.Select(static p => p.Key).FirstOrDefault(k => !known.Contains(k));
        if (extra is not null) throw new QmpErrorException($"Parameter '{Join(path, extra)}' is unexpected");
    }

    internal override JsonObject Describe(Func<QmpType, string> nameOf)
    {
        var described = new JsonArray();
        foreach (QmpMember member in members.Where(static m => !m.Hidden))
        {
            var one = new JsonObject { ["name"] = member.Name, ["type"] = nameOf(member.Type) };
            if (member.Optional) one["default"] = null;
            described.Add((JsonNode)one);
        }
        var entity = new JsonObject { ["members"] = described, ["meta-type"] = "object" };
        if (Tag is null) return entity;
        entity["tag"] = Tag;
        IReadOnlyList<string> cases = ((QmpEnum)members.First(m => m.Name == Tag).Type).Values;
        entity["variants"] = new JsonArray([.. cases.Select(c => new JsonObject { ["case"] = c, ["type"] = nameOf(Variants.GetValueOrDefault(c, Empty)) })]);
        return entity;
    }

    private void CheckMembers(JsonObject value, string path, HashSet<string> known)
    {
        foreach (QmpMember member in members)
        {
            known.Add(member.Name);
            if (value.TryGetPropertyValue(member.Name, out JsonNode? found)) member.Type.Check(found, member.Name, Join(path, member.Name));
            else if (!member.Optional) throw new QmpErrorException($"Parameter '{Join(path, member.Name)}' is missing");
        }
        if (Tag is not null && Variants.TryGetValue(value[Tag]!.GetValue<string>(), out QmpObject? variant)) variant.CheckMembers(value, path, known);
    }

    private static string Join(string path, string name) => path.Length == 0 ? name : $"{path}.{name}";
}
