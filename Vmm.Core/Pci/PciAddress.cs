using System.Globalization;
using Vmm.Core.Errors;

namespace Vmm.Core.Pci;

/// <summary>Slot and function of a function on bus 0 of domain 0 (QEMU: <c>devfn</c>).</summary>
/// <param name="Slot">0 to 31.</param>
/// <param name="Function">0 to 7.</param>
public readonly record struct PciAddress(int Slot, int Function)
{
    /// <summary>Slot and function in one byte; on bus 0 also the requester id.</summary>
    public byte DevFn => (byte)(Slot << 3 | Function);

    /// <summary>Parses QEMU's <c>addr=</c>: a hexadecimal slot, optionally followed by a dot and the function.</summary>
    /// <param name="text">E.g. <c>5</c>, <c>0x1f.3</c>.</param>
    /// <exception cref="ConfigurationException">Not an address.</exception>
    public static PciAddress Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        int dot = text.IndexOf('.', StringComparison.Ordinal);
        string slotText = dot < 0 ? text : text[..dot];
        if (slotText.StartsWith("0x", StringComparison.OrdinalIgnoreCase)) slotText = slotText[2..];
        int function = 0;
        if (!int.TryParse(slotText, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out int slot) || slot is < 0 or > 31
            || (dot >= 0 && (!int.TryParse(text.AsSpan(dot + 1), NumberStyles.None, CultureInfo.InvariantCulture, out function) || function > 7)))
            throw new ConfigurationException($"PCI address '{text}' must be SLOT[.FUNCTION] with slot 0 to 1f (hexadecimal) and function 0 to 7");
        return new PciAddress(slot, function);
    }

    /// <summary>QEMU's device path, e.g. <c>0000:00:02.0</c>.</summary>
    /// <returns>Domain, bus, slot and function.</returns>
    public override string ToString() => $"0000:00:{Slot:x2}.{Function}";
}
