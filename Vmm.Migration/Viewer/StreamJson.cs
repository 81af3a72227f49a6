using System.Text.Json;
using Vmm.Migration.Ram;

namespace Vmm.Migration.Viewer;

/// <summary>Writes the content of <see cref="StreamText"/> as JSON, for programs. Keys are lower case with hyphens; opaque bytes are hex strings.</summary>
internal static class StreamJson
{
    /// <summary>Writes a document as one JSON object.</summary>
    /// <param name="document">The decoded stream.</param>
    /// <param name="output">Receives the object as UTF-8.</param>
    /// <param name="withEntries">False leaves the entries out and writes the findings only.</param>
    public static void Write(StreamDocument document, System.IO.Stream output, bool withEntries = true)
    {
        ArgumentNullException.ThrowIfNull(document);
        using var json = new Utf8JsonWriter(output, new JsonWriterOptions { Indented = true });
        json.WriteStartObject();
        json.WriteString("file", document.Name);
        json.WriteNumber("length", document.LengthBytes);
        json.WriteNumber("start", document.StartOffset);
        if (document.Machine is { } machine) json.WriteString("machine", machine);
        json.WriteNumber("page-size", document.PageSize);
        json.WriteBoolean("has-vmdesc", document.HasVmDescription);
        json.WriteBoolean("valid", document.IsValid);
        json.WriteBoolean("complete", document.IsComplete);
        json.WriteStartArray("ram-blocks");
        foreach (RamBlockSummary block in document.RamBlocks) WriteBlock(json, block);
        json.WriteEndArray();
        if (withEntries)
        {
            json.WriteStartArray("entries");
            foreach (StreamEntry entry in document.Entries) WriteEntry(json, entry);
            json.WriteEndArray();
        }
        json.WriteStartArray("findings");
        foreach (StreamFinding finding in document.Findings)
        {
            json.WriteStartObject();
            json.WriteString("severity", finding.Severity.ToString().ToLowerInvariant());
            json.WriteNumber("offset", finding.Offset);
            json.WriteString("section", finding.Section);
            json.WriteString("message", finding.Message);
            json.WriteEndObject();
        }
        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static void WriteBlock(Utf8JsonWriter json, RamBlockSummary block)
    {
        json.WriteStartObject();
        json.WriteString("name", block.Name);
        json.WriteNumber("used-length", block.UsedLength);
        if (block.PageSize is { } size) json.WriteNumber("page-size", size);
        if (block.Address is { } address) json.WriteNumber("address", address);
        if (block.BitmapOffset is { } bitmap) json.WriteNumber("bitmap-offset", bitmap);
        if (block.PagesOffset is { } pages) json.WriteNumber("pages-offset", pages);
        WriteCounts(json, block.Pages);
        json.WriteEndObject();
    }

    private static void WriteCounts(Utf8JsonWriter json, RamPageCounts counts)
    {
        json.WriteNumber("data", counts.Data);
        json.WriteNumber("zero", counts.Zero);
        json.WriteNumber("xbzrle", counts.Xbzrle);
    }

    private static void WriteEntry(Utf8JsonWriter json, StreamEntry entry)
    {
        json.WriteStartObject();
        json.WriteString("kind", JsonNamingPolicy.KebabCaseLower.ConvertName(entry.Kind.ToString()));
        json.WriteNumber("offset", entry.Offset);
        json.WriteNumber("length", entry.Length);
        if (entry.Depth > 0) json.WriteNumber("depth", entry.Depth);
        if (entry.Name is { } name) json.WriteString("name", name);
        if (entry.SectionId is { } id) json.WriteNumber("section-id", id);
        if (entry.InstanceId is { } instance) json.WriteNumber("instance-id", instance);
        if (entry.VersionId is { } version) json.WriteNumber("version-id", version);
        if (entry.Ram.Count > 0)
        {
            json.WriteStartArray("ram");
            foreach (RamPageCounts counts in entry.Ram)
            {
                json.WriteStartObject();
                json.WriteString("block", counts.Block);
                WriteCounts(json, counts);
                json.WriteEndObject();
            }
            json.WriteEndArray();
        }
        if (entry.Pages.Count > 0)
        {
            json.WriteStartArray("pages");
            foreach (RamPageRecord page in entry.Pages)
            {
                json.WriteStartObject();
                json.WriteNumber("file-offset", page.FileOffset);
                json.WriteString("kind", page.Kind.ToString().ToLowerInvariant());
                json.WriteString("block", page.Block);
                json.WriteNumber("offset", page.PageOffset);
                json.WriteEndObject();
            }
            json.WriteEndArray();
        }
        WriteFields(json, entry.Fields);
        json.WriteEndObject();
    }

    private static void WriteFields(Utf8JsonWriter json, IReadOnlyList<StreamField> fields)
    {
        if (fields.Count == 0) return;
        json.WriteStartArray("fields");
        foreach (StreamField field in fields)
        {
            json.WriteStartObject();
            json.WriteString("name", field.Name);
            json.WriteString("type", field.Type);
            json.WriteNumber("offset", field.Offset);
            json.WriteNumber("length", field.Length);
            if (field.Value is { } value)
            {
                json.WritePropertyName("value");
                WriteValue(json, value);
            }
            WriteFields(json, field.Children);
            json.WriteEndObject();
        }
        json.WriteEndArray();
    }

    private static void WriteValue(Utf8JsonWriter json, object value)
    {
        switch (value)
        {
            case bool b: json.WriteBooleanValue(b); break;
            case ulong u: json.WriteNumberValue(u); break;
            case long l: json.WriteNumberValue(l); break;
            case IEnumerable<object> list:
                json.WriteStartArray();
                foreach (object element in list) WriteValue(json, element);
                json.WriteEndArray();
                break;
            default: json.WriteStringValue(value.ToString()); break;
        }
    }
}
