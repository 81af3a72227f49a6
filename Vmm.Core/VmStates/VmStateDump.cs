using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace Vmm.Core.VmStates;

/// <summary>
/// Writes descriptions in the format of QEMU's <c>-dump-vmstate</c> (stream 2.7), so that QEMU's <c>vmstate-static-checker.py</c> can tell whether
/// two builds of this product can load each other's state. Deterministic: entries keep the caller's order.
/// </summary>
public static class VmStateDump
{
    /// <summary>Writes a dump.</summary>
    /// <param name="machine">Machine name in the dump.</param>
    /// <param name="descriptions">Device types with their descriptions; the second entry of a type is written as <c>type#2</c>, and so on.</param>
    /// <returns>Indented JSON that ends with a line feed.</returns>
    public static string Write(string machine, IEnumerable<(string TypeName, IVmStateDescription Description)> descriptions)
    {
        ArgumentNullException.ThrowIfNull(machine);
        ArgumentNullException.ThrowIfNull(descriptions);
        using var bytes = new MemoryStream();
        using (var json = new Utf8JsonWriter(bytes, new JsonWriterOptions { Indented = true, NewLine = "\n", Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping }))
        {
            json.WriteStartObject();
            json.WriteStartObject("vmschkmachine");
            json.WriteString("Name", machine);
            json.WriteEndObject();
            var seen = new Dictionary<string, int>(StringComparer.Ordinal);
            foreach ((string typeName, IVmStateDescription description) in descriptions)
            {
                int n = seen[typeName] = seen.GetValueOrDefault(typeName) + 1;
                string name = n == 1 ? typeName : $"{typeName}#{n}";
                json.WriteStartObject(name);
                json.WriteString("Name", name);
                WriteVersions(json, description);
                json.WriteStartObject("Description");
                WriteDescription(json, description);
                json.WriteEndObject();
                json.WriteEndObject();
            }
            json.WriteEndObject();
        }
        return Encoding.UTF8.GetString(bytes.GetBuffer(), 0, (int)bytes.Length) + "\n";
    }

    private static void WriteVersions(Utf8JsonWriter json, IVmStateDescription description)
    {
        json.WriteNumber("version_id", description.VersionId);
        json.WriteNumber("minimum_version_id", description.MinimumVersionId);
    }

    private static void WriteDescription(Utf8JsonWriter json, IVmStateDescription description)
    {
        json.WriteString("name", description.Name);
        WriteVersions(json, description);
        // A validation has no bytes in the stream, so the checker does not need it.
        IVmStateFieldInfo[] fields = [.. description.Fields.Where(static f => !f.IsMustExist)];
        if (fields.Length > 0)
        {
            json.WriteStartArray("Fields");
            foreach (IVmStateFieldInfo field in fields) WriteField(json, field);
            json.WriteEndArray();
        }
        if (description.Subsections.Count > 0)
        {
            json.WriteStartArray("Subsections");
            foreach (IVmStateDescription sub in description.Subsections)
            {
                json.WriteStartObject();
                WriteDescription(json, sub);
                json.WriteEndObject();
            }
            json.WriteEndArray();
        }
    }

    private static void WriteField(Utf8JsonWriter json, IVmStateFieldInfo field)
    {
        json.WriteStartObject();
        json.WriteString("field", field.Name);
        json.WriteNumber("version_id", field.VersionId);
        json.WriteBoolean("field_exists", field.HasFieldExists);
        if (field.Num is { } num) json.WriteNumber("num", num);
        json.WriteNumber("size", field.SizeBytes);
        if (field.Description is { } nested)
        {
            json.WriteStartObject("Description");
            WriteDescription(json, nested);
            json.WriteEndObject();
        }
        json.WriteEndObject();
    }
}
