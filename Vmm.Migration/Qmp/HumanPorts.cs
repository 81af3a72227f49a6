using System.Globalization;
using Vmm.Core.Pci;

namespace Vmm.Migration.Qmp;

/// <summary>
/// Runs the lines <c>i/FMT PORT[.INDEX]</c> and <c>o/FMT PORT VALUE</c>, which access the guest's I/O ports as a CPU does (QEMU:
/// <c>hmp_ioport_read</c>, <c>hmp_ioport_write</c>).
/// </summary>
internal static class HumanPorts
{
    /// <summary>True if a line's first word is one of the two commands.</summary>
    internal static bool IsOne(string word) => word is ['i' or 'o'] or ['i' or 'o', '/', ..];

    /// <summary>Runs a line that is split into command, optional format word and numbers.</summary>
    /// <returns>The text that QEMU prints.</returns>
    internal static string Run(PciHost pci, List<string> words)
    {
        string name = words[0][..1];
        string format = words[0].Length > 1 ? words[0][2..] : "";
        words.RemoveAt(0);
        if (words.Count > 0 && words[0].StartsWith('/'))
        {
            format = words[0][1..];
            words.RemoveAt(0);
        }
        string help = $"\nTry \"help {name}\" for more information";
        int size = 4;
        foreach (char c in format)
        {
            switch (c)
            {
                case 'b': size = 1; break;
                case 'h': size = 2; break;
                case 'w': size = 4; break;
                case 'x' or 'd' or 'u' or 'o': break;
                default: return $"invalid char in format: '{c}'{help}";
            }
        }
        bool isWrite = name == "o";
        // QEMU's index follows a dot: i/b 0x70.3 writes 3 to port 0x70 and reads port 0x71.
        if (!isWrite && words.Count > 0 && words[0].IndexOf('.', StringComparison.Ordinal) is var dot and > 0)
        {
            words.Insert(1, words[0][(dot + 1)..]);
            words[0] = words[0][..dot];
        }
        else if (!isWrite && words.Count > 1) return $"{name}: extraneous characters at the end of line{help}";
        if (words.Count < (isWrite ? 2 : 1)) return $"unexpected end of expression{help}";
        if (words.Count > 2) return $"{name}: extraneous characters at the end of line{help}";
        var numbers = new uint[2];
        for (int i = 0; i < words.Count; i++)
            if (!TryNumber(words[i], out numbers[i])) return $"invalid char '{words[i][0]}' in expression{help}";
        if (isWrite)
        {
            pci.PioWrite((ushort)numbers[0], size, numbers[1]);
            return "";
        }
        ushort port = (ushort)numbers[0];
        if (words.Count == 2)
        {
            pci.PioWrite(port, 1, numbers[1] & 0xff);
            port++;
        }
        char suffix = size switch { 1 => 'b', 2 => 'w', _ => 'l' };
        return $"port{suffix}[0x{port:x4}] = 0x{pci.PioRead(port, size).ToString($"x{size * 2}", CultureInfo.InvariantCulture)}\n";
    }

    private static bool TryNumber(string text, out uint value) => text.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
        ? uint.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out value)
        : uint.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out value);
}
