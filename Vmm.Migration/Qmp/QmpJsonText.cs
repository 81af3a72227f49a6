using System.Globalization;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace Vmm.Migration.Qmp;

/// <summary>Reads and writes JSON text in QMP's dialect: decodes strings as leniently as QEMU does, and writes one line of ASCII.</summary>
internal static class QmpJsonText
{
    /// <summary>Decodes a string token with its quotes.</summary>
    /// <returns>Null on success, else QEMU's text of the error.</returns>
    internal static string? TryDecode(ReadOnlySpan<byte> token, out string value)
    {
        ReadOnlySpan<byte> text = token[1..^1];
        value = string.Empty;
        var result = new StringBuilder(text.Length);
        while (text.Length > 0)
        {
            if (text[0] != '\\')
            {
                if (Utf8(text, out int length) is not { } rune) return "invalid UTF-8 sequence in string";
                result.Append(rune);
                text = text[length..];
                continue;
            }
            if (text[1] == 'u')
            {
                if (Unicode(text, out int length) is not { } rune) return $"{Encoding.Latin1.GetString(text[..length])} is not a valid Unicode character";
                result.Append(rune);
                text = text[length..];
                continue;
            }
            int at = "\"'\\/bfnrt".IndexOf((char)text[1], StringComparison.Ordinal);
            if (at < 0) return "invalid escape sequence in string";
            result.Append("\"'\\/\b\f\n\r\t"[at]);
            text = text[2..];
        }
        value = result.ToString();
        return null;
    }

    /// <summary>Makes a number that keeps its text, so that callers can read it as any type that it fits.</summary>
    internal static JsonNode Number(ReadOnlySpan<byte> text) => JsonNode.Parse(text)!;

    /// <summary>Writes a value as one line of ASCII with QEMU's spacing.</summary>
    internal static StringBuilder Append(StringBuilder to, JsonNode? value)
    {
        switch (value)
        {
            case null:
                return to.Append("null");
            case JsonObject o:
                to.Append('{');
                string separator = string.Empty;
                foreach ((string key, JsonNode? member) in o)
                {
                    AppendString(to.Append(separator), key).Append(": ");
                    Append(to, member);
                    separator = ", ";
                }
                return to.Append('}');
            case JsonArray a:
                to.Append('[');
                for (int i = 0; i < a.Count; i++) Append(i == 0 ? to : to.Append(", "), a[i]);
                return to.Append(']');
            default:
                return value.GetValueKind() == JsonValueKind.String ? AppendString(to, value.GetValue<string>()) : to.Append(value.ToJsonString());
        }
    }

    /// <summary>Encodes a message for the wire: one line that ends in CRLF.</summary>
    internal static byte[] Line(JsonNode message) => Encoding.ASCII.GetBytes(Append(new StringBuilder(), message).Append("\r\n").ToString());

    private static StringBuilder AppendString(StringBuilder to, string value)
    {
        to.Append('"');
        foreach (char c in value)
        {
            int at = "\"\\\b\f\n\r\t".IndexOf(c, StringComparison.Ordinal);
            if (at >= 0) to.Append('\\').Append("\"\\bfnrt"[at]);
            else if (c is >= ' ' and < '\x7f') to.Append(c);
            else to.Append(CultureInfo.InvariantCulture, $"\\u{(int)c:X4}");
        }
        return to.Append('"');
    }

    // QEMU accepts modified UTF-8, where C0 80 is NUL, and refuses noncharacters as it refuses surrogates.
    private static Rune? Utf8(ReadOnlySpan<byte> text, out int length)
    {
        length = 2;
        if (text is [0xC0, 0x80, ..]) return new Rune('\0');
        return Rune.DecodeFromUtf8(text, out Rune rune, out length) == System.Buffers.OperationStatus.Done && !IsNonCharacter(rune.Value) ? rune : null;
    }

    private static Rune? Unicode(ReadOnlySpan<byte> text, out int length)
    {
        length = Math.Min(text.Length, 6);
        int high = Hex(text);
        if (high is >= 0xD800 and <= 0xDBFF && text.Length > 6)
        {
            int low = Hex(text[6..]);
            if (low is < 0xDC00 or > 0xDFFF) return null;
            length = 12;
            high = 0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF);
        }
        return high >= 0 && Rune.IsValid(high) && !IsNonCharacter(high) ? new Rune(high) : null;
    }

    private static int Hex(ReadOnlySpan<byte> text) =>
        text.Length >= 6 && text[0] == '\\' && text[1] == 'u' && int.TryParse(text[2..6], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out int n)
            ? n : -1;

    private static bool IsNonCharacter(int value) => value is >= 0xFDD0 and <= 0xFDEF || (value & 0xFFFE) == 0xFFFE;
}
