using System.Globalization;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Formats figures and results for people and for programs.</summary>
internal static class Format
{
    private static readonly string[] s_units = ["B", "KiB", "MiB", "GiB", "TiB"];

    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    /// <summary>E.g. <c>512 MiB</c>; three significant digits, none lost on whole units.</summary>
    public static string Size(double bytes)
    {
        int unit = 0;
        while (Math.Abs(bytes) >= 1024 && unit < s_units.Length - 1)
        {
            bytes /= 1024;
            unit++;
        }
        return $"{Digits(bytes)} {s_units[unit]}";
    }

    /// <summary>E.g. <c>1.25 GiB/s</c>.</summary>
    public static string Rate(double bytesPerSecond) => $"{Size(bytesPerSecond)}/s";

    /// <summary>E.g. <c>4.2 ms</c>, <c>1.25 s</c> or <c>2 min 5 s</c>.</summary>
    public static string Milliseconds(double ms) => ms switch
    {
        < 1000 => $"{Digits(ms)} ms",
        < 60_000 => $"{Digits(ms / 1000)} s",
        _ => string.Create(CultureInfo.InvariantCulture, $"{(long)(ms / 60_000)} min {(long)(ms / 1000) % 60} s"),
    };

    public static void WriteJson(TextWriter to, JsonNode node) => to.WriteLine(node.ToJsonString(s_json));

    /// <summary>Left-aligned columns, two blanks apart, no trailing blanks.</summary>
    public static void WriteTable(TextWriter to, IReadOnlyList<string[]> rows)
    {
        int columns = rows.Max(static r => r.Length);
        int[] widths = [.. Enumerable.Range(0, columns).Select(c => rows.Max(r => c < r.Length ? r[c].Length : 0))];
        foreach (string[] row in rows)
            to.WriteLine(string.Join("  ", row.Select((cell, c) => cell.PadRight(widths[c]))).TrimEnd());
    }

    private static string Digits(double value)
    {
        double magnitude = Math.Abs(value);
        string format = magnitude >= 100 ? "0" : magnitude >= 10 ? "0.#" : "0.##";
        return value.ToString(format, CultureInfo.InvariantCulture);
    }
}
