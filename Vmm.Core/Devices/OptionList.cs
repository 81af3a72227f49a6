using System.Globalization;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Parser of QEMU's comma-separated option syntax. Stateless; thread-safe.</summary>
public static class OptionList
{
    /// <summary>Splits at commas; a doubled comma stands for one comma.</summary>
    /// <returns>At least one part.</returns>
    public static string[] Split(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        return [.. text.Replace(",,", "\u0001", StringComparison.Ordinal).Split(',').Select(static p => p.Replace('\u0001', ','))];
    }

    /// <summary>Splits <c>key=value</c>; <paramref name="what"/> names the option in an error.</summary>
    /// <exception cref="ConfigurationException">The part has no <c>=</c> or no key.</exception>
    public static KeyValuePair<string, string> Pair(string part, string what)
    {
        ArgumentNullException.ThrowIfNull(part);
        int at = part.IndexOf('=', StringComparison.Ordinal);
        return at > 0 ? new(part[..at], part[(at + 1)..]) : throw new ConfigurationException($"{what}: expected key=value, found '{part}'");
    }

    /// <summary>Parses on or off; <paramref name="what"/> names the option in an error.</summary>
    /// <exception cref="ConfigurationException">The value is neither on nor off.</exception>
    public static bool Bool(string value, string what) => value switch
    {
        "on" or "yes" or "true" => true,
        "off" or "no" or "false" => false,
        _ => throw new ConfigurationException($"{what} expects on or off, found '{value}'"),
    };

    /// <summary>
    /// Parses a size: a decimal or 0x number, an optional suffix K, M, G or T (powers of 1024), and an optional iB or B after it.
    /// <paramref name="what"/> names the option in an error.
    /// </summary>
    /// <returns>The size, bytes.</returns>
    /// <exception cref="ConfigurationException">The value is not a size, or exceeds 2^63.</exception>
    public static ulong SizeBytes(string value, string what)
    {
        ArgumentNullException.ThrowIfNull(value);
        string text = value.EndsWith("iB", StringComparison.Ordinal) ? value[..^2] : value;
        if (text.StartsWith("0x", StringComparison.OrdinalIgnoreCase))
        {
            if (ulong.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong hex)) return hex;
        }
        else if (text.Length > 0)
        {
            int shift = "KMGT".IndexOf(char.ToUpperInvariant(text[^1]), StringComparison.Ordinal);
            if (ulong.TryParse(shift >= 0 ? text.AsSpan(0, text.Length - 1) : text, NumberStyles.None, CultureInfo.InvariantCulture, out ulong n))
            {
                int bits = 10 * (shift + 1);
                if (n <= (ulong)long.MaxValue >> bits) return n << bits;
            }
        }
        throw new ConfigurationException($"{what} expects a size such as 512M, found '{value}'");
    }
}
