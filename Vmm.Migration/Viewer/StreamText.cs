using System.Globalization;
using System.Text;

namespace Vmm.Migration.Viewer;

/// <summary>Writes a document as text for people: one line an entry, with its fields indented below.</summary>
internal static class StreamText
{
    private const int HexBytes = 32;

    /// <summary>Writes a document.</summary>
    /// <param name="document">The decoded stream.</param>
    /// <param name="output">Receives the lines.</param>
    public static void Write(StreamDocument document, TextWriter output)
    {
        ArgumentNullException.ThrowIfNull(document);
        ArgumentNullException.ThrowIfNull(output);
        Line(output, $"{document.Name}: {document.LengthBytes} bytes, machine {document.Machine ?? "not named"}, pages of {document.PageSize} bytes, "
            + $"{(document.HasVmDescription ? "described by VMDESC" : "no VMDESC")}");
        WriteBlocks(document, output);
        output.WriteLine();
        Line(output, $"{"OFFSET",12} {"LENGTH",10}  ENTRY");
        foreach (StreamEntry entry in document.Entries) WriteEntry(entry, output);
        WriteFindings(document, output);
    }

    /// <summary>Writes the findings, the most severe last, and a verdict.</summary>
    /// <param name="document">The decoded stream.</param>
    /// <param name="output">Receives the lines.</param>
    public static void WriteFindings(StreamDocument document, TextWriter output)
    {
        ArgumentNullException.ThrowIfNull(document);
        ArgumentNullException.ThrowIfNull(output);
        if (document.Findings.Count > 0) output.WriteLine();
        foreach (StreamFinding finding in document.Findings) Line(output, $"{finding.Severity.ToString().ToLowerInvariant()}: {finding}");
        int violations = document.Violations.Count();
        output.WriteLine();
        output.WriteLine(violations == 0 ? $"{document.Name}: well-formed, {document.Entries.Count} entries"
            : $"{document.Name}: {violations} violation{(violations == 1 ? "" : "s")}{(document.IsComplete ? "" : ", not read to the end")}");
    }

    /// <summary>Formats one value.</summary>
    /// <param name="value">A <see cref="StreamField.Value"/>.</param>
    /// <returns>The value as text.</returns>
    public static string ValueText(object? value) => value switch
    {
        null => "",
        bool b => b ? "true" : "false",
        ulong u => u < 10 ? u.ToString(CultureInfo.InvariantCulture) : string.Create(CultureInfo.InvariantCulture, $"{u} (0x{u:x})"),
        long l => l.ToString(CultureInfo.InvariantCulture),
        IEnumerable<object> list => $"[{string.Join(", ", list.Select(Short))}]",
        _ => value.ToString() ?? "",
    };

    private static string Short(object value) => value is ulong u and > 9 ? $"0x{u:x}" : ValueText(value);

    /// <summary>Replaces control characters: names come from the file and must not send control sequences to a terminal.</summary>
    private static void Line(TextWriter output, string text) =>
        output.WriteLine(text.Any(static c => char.IsControl(c)) ? string.Concat(text.Select(static c => char.IsControl(c) ? '?' : c)) : text);

    private static void WriteBlocks(StreamDocument document, TextWriter output)
    {
        if (document.RamBlocks.Count == 0) return;
        output.WriteLine();
        Line(output, $"{"RAM BLOCK",-32} {"LENGTH",14} {"DATA",10} {"ZERO",10} {"XBZRLE",10}");
        foreach (RamBlockSummary block in document.RamBlocks)
        {
            var extra = new StringBuilder();
            if (block.PageSize is { } size) extra.Append($"  page size 0x{size:x}");
            if (block.Address is { } address) extra.Append($"  at 0x{address:x}");
            if (block.PagesOffset is { } pages) extra.Append(pages == 0 ? "  not in the file" : $"  bitmap at 0x{block.BitmapOffset:x}, pages at 0x{pages:x}");
            Line(output, $"{block.Name,-32} {(block.UsedLength == 0 ? "unknown" : $"0x{block.UsedLength:x}"),14} {block.Pages.Data,10} {block.Pages.Zero,10} {block.Pages.Xbzrle,10}{extra}");
        }
    }

    private static void WriteEntry(StreamEntry entry, TextWriter output)
    {
        string indent = new(' ', 2 * entry.Depth);
        Line(output, $"{$"0x{entry.Offset:x}",12} {entry.Length,10}  {indent}{Title(entry)}");
        foreach (RamPageCounts counts in entry.Ram)
            Line(output, $"{"",25}{indent}  {counts.Block}: {counts.Data} data, {counts.Zero} zero, {counts.Xbzrle} xbzrle");
        foreach (RamPageRecord page in entry.Pages)
            Line(output, $"{"",25}{indent}  0x{page.FileOffset:x} {page.Kind.ToString().ToLowerInvariant()} {page.Block}+0x{page.PageOffset:x}");
        foreach (StreamField field in entry.Fields) WriteField(field, indent.Length + 27, output);
    }

    private static string Title(StreamEntry entry) => entry.Kind switch
    {
        StreamEntryKind.Header => $"HEADER version {entry.VersionId}",
        StreamEntryKind.Configuration => $"CONFIGURATION '{entry.Name}'",
        StreamEntryKind.Command => $"COMMAND {entry.Name}",
        StreamEntryKind.Eof => "EOF",
        StreamEntryKind.VmDescription => "VMDESC",
        StreamEntryKind.Unread => "not read",
        _ => $"{entry.Kind.ToString().ToUpperInvariant()} {entry.SectionId} '{entry.Name}' instance {entry.InstanceId} version {entry.VersionId}",
    };

    private static void WriteField(StreamField field, int indent, TextWriter output)
    {
        string value = field.Value is string hex && field.Type is not ("string" or "uuid" or "range" or "timer") ? HexText(hex) : ValueText(field.Value);
        Line(output, $"{new string(' ', indent)}{field.Name}: {(value.Length > 0 ? value + " " : "")}({field.Type}, {field.Length} {(field.Length == 1 ? "byte" : "bytes")})");
        foreach (StreamField child in field.Children) WriteField(child, indent + 2, output);
    }

    private static string HexText(string hex)
    {
        if (LeafValue.TextOf(hex) is { } text) return $"\"{text}\"";
        return hex.Length <= 2 * HexBytes ? hex : hex[..(2 * HexBytes)] + "...";
    }
}
