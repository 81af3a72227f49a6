using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Core.Wire;

namespace Vmm.Migration.Viewer;

/// <summary>Fields and subsections of one state, as VMDESC lists them (stream 2.6).</summary>
internal sealed class DescribedState
{
    /// <summary>u8 05, u8 name length, u32 version.</summary>
    internal const int SubsectionHeadBytes = 6;

    private long? _lengthBytes;

    internal string Name { get; set; } = "";

    internal long Version { get; set; }

    internal List<DescribedField> Fields { get; } = [];

    internal List<DescribedState> Subsections { get; } = [];

    /// <summary>Bytes on the wire: sum of size x count, and 6 + name + body for each subsection. Valid once the description is complete.</summary>
    internal long LengthBytes => _lengthBytes ??= Fields.Aggregate(0L, static (sum, f) => checked(sum + (f.Size * f.Count)))
        + Subsections.Aggregate(0L, static (sum, s) => checked(sum + SubsectionHeadBytes + s.Name.Length + s.LengthBytes));
}

/// <summary>One field of a state.</summary>
internal sealed class DescribedField
{
    private long? _nestedBytes;

    internal string Name { get; set; } = "";

    internal string Type { get; set; } = "";

    /// <summary>Bytes of one element.</summary>
    internal long Size { get; set; }

    /// <summary><c>array_len</c>, or 1.</summary>
    internal long Count { get; set; } = 1;

    /// <summary><c>index</c> of an element of an array that is listed element by element.</summary>
    internal long? Index { get; set; }

    /// <summary>The nested states: one for a struct, one for each element of a list.</summary>
    internal List<DescribedState> Nested { get; } = [];

    /// <summary>Sum over the nested states. Valid once the description is complete.</summary>
    internal long NestedBytes => _nestedBytes ??= Nested.Aggregate(0L, static (sum, s) => checked(sum + s.LengthBytes));
}

/// <summary>A FULL section of the description.</summary>
internal sealed class DescribedDevice
{
    internal string Name { get; set; } = "";

    internal long InstanceId { get; set; }

    /// <summary>Null for an old-style section, whose description has no version.</summary>
    internal long? Version { get; set; }

    internal DescribedState State { get; } = new();
}

/// <summary>
/// The VMDESC of a stream (stream 1.6). The parser reads the text in order and without a map, because keys may repeat: a list writes the keys of its
/// elements inline, once for each element.
/// </summary>
internal sealed class VmDescription
{
    private const int MaxDepth = 3 * WireLimits.VmStateDepth + 8;

    private VmDescription()
    {
    }

    internal int? PageSize { get; private set; }

    internal DescribedState? Configuration { get; private set; }

    internal List<DescribedDevice> Devices { get; } = [];

    /// <summary>Parses the JSON text.</summary>
    /// <exception cref="StreamFormatException">Not JSON, or not a VMDESC.</exception>
    internal static VmDescription Parse(ReadOnlySpan<byte> json)
    {
        var reader = new Utf8JsonReader(json, new JsonReaderOptions { MaxDepth = MaxDepth });
        var description = new VmDescription();
        try
        {
            Expect(ref reader, JsonTokenType.StartObject);
            while (NextKey(ref reader, out string key))
            {
                switch (key)
                {
                    case "page_size": description.PageSize = (int)Number(ref reader, int.MaxValue); break;
                    case "configuration": description.Configuration = State(ref reader); break;
                    case "devices": ReadDevices(ref reader, description.Devices); break;
                    default: Skip(ref reader); break;
                }
            }
            if (reader.Read()) throw new JsonException("more after the end");
            // Compute every sum now, so that an overflow is reported as an error of the text.
            foreach (DescribedDevice device in description.Devices) _ = device.State.LengthBytes;
            _ = description.Configuration?.LengthBytes;
            return description;
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or OverflowException)
        {
            // The reader throws InvalidOperationException for a string that is not UTF-8.
            throw new StreamFormatException($"VMDESC cannot be read at byte {reader.BytesConsumed} of its text: {e.Message}", e) { Section = "vmdesc" };
        }
    }

    private static void ReadDevices(ref Utf8JsonReader reader, List<DescribedDevice> devices)
    {
        Expect(ref reader, JsonTokenType.StartArray);
        while (NextElement(ref reader))
        {
            var device = new DescribedDevice();
            while (NextKey(ref reader, out string key))
            {
                switch (key)
                {
                    case "name": device.Name = Text(ref reader); break;
                    case "instance_id": device.InstanceId = Number(ref reader, uint.MaxValue); break;
                    case "version": device.Version = device.State.Version = Number(ref reader, uint.MaxValue); break;
                    default:
                        if (!StateMember(ref reader, key, device.State)) Skip(ref reader);
                        break;
                }
            }
            devices.Add(device);
        }
    }

    private static DescribedState State(ref Utf8JsonReader reader)
    {
        Expect(ref reader, JsonTokenType.StartObject);
        return StateMembers(ref reader);
    }

    /// <summary>Reads the members of an object whose brace has been read.</summary>
    private static DescribedState StateMembers(ref Utf8JsonReader reader)
    {
        var state = new DescribedState();
        while (NextKey(ref reader, out string key))
            if (!StateMember(ref reader, key, state)) Skip(ref reader);
        return state;
    }

    private static bool StateMember(ref Utf8JsonReader reader, string key, DescribedState state)
    {
        switch (key)
        {
            case "vmsd_name": state.Name = Text(ref reader); return true;
            case "version": state.Version = Number(ref reader, uint.MaxValue); return true;
            case "fields":
                Expect(ref reader, JsonTokenType.StartArray);
                while (NextElement(ref reader)) state.Fields.Add(Field(ref reader));
                return true;
            case "subsections":
                Expect(ref reader, JsonTokenType.StartArray);
                while (NextElement(ref reader)) state.Subsections.Add(StateMembers(ref reader));
                return true;
            default: return false;
        }
    }

    private static DescribedField Field(ref Utf8JsonReader reader)
    {
        var field = new DescribedField();
        DescribedState? inline = null;
        while (NextKey(ref reader, out string key))
        {
            switch (key)
            {
                case "name": field.Name = Text(ref reader); break;
                case "type": field.Type = Text(ref reader); break;
                case "size": field.Size = Number(ref reader, long.MaxValue); break;
                case "array_len": field.Count = Number(ref reader, int.MaxValue); break;
                case "index": field.Index = Number(ref reader, int.MaxValue); break;
                case "struct": field.Nested.Add(State(ref reader)); break;
                case "vmsd_name":
                    // Each repetition of the key begins another element.
                    inline = new DescribedState { Name = Text(ref reader) };
                    field.Nested.Add(inline);
                    break;
                default:
                    if (inline is null || !StateMember(ref reader, key, inline)) Skip(ref reader);
                    break;
            }
        }
        _ = field.NestedBytes;
        return field;
    }

    private static void Expect(ref Utf8JsonReader reader, JsonTokenType type)
    {
        if (!reader.Read() || reader.TokenType != type) throw new JsonException($"expected {type}, found {reader.TokenType}");
    }

    private static bool NextKey(ref Utf8JsonReader reader, out string key)
    {
        key = "";
        if (!reader.Read()) throw new JsonException("the text ends inside an object");
        if (reader.TokenType == JsonTokenType.EndObject) return false;
        key = reader.GetString()!;
        return true;
    }

    /// <summary>Reads the brace of the next object of an array; false at the array's end.</summary>
    private static bool NextElement(ref Utf8JsonReader reader)
    {
        if (!reader.Read()) throw new JsonException("the text ends inside an array");
        if (reader.TokenType == JsonTokenType.EndArray) return false;
        return reader.TokenType == JsonTokenType.StartObject ? true : throw new JsonException($"expected an object, found {reader.TokenType}");
    }

    private static string Text(ref Utf8JsonReader reader)
    {
        Expect(ref reader, JsonTokenType.String);
        return reader.GetString()!;
    }

    private static long Number(ref Utf8JsonReader reader, long max)
    {
        Expect(ref reader, JsonTokenType.Number);
        return reader.TryGetInt64(out long value) && value >= 0 && value <= max ? value : throw new JsonException($"expected a number up to {max}");
    }

    private static void Skip(ref Utf8JsonReader reader)
    {
        reader.Read();
        reader.Skip();
    }
}
