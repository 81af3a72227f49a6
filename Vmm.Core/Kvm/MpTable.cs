using static System.Buffers.Binary.BinaryPrimitives;

namespace Vmm.Core.Kvm;

/// <summary>
/// Intel's MultiProcessor table 1.4: how a kernel without ACPI finds the other vCPUs and the I/O APIC. PCI's four lines are pins 20 to 23, by the
/// bus's swizzle.
/// </summary>
internal static class MpTable
{
    private const byte IoApicBase = 64; // Above every vCPU's id.

    /// <summary>Floating pointer and table, to be placed at an address.</summary>
    internal static byte[] Build(uint address, int cpus)
    {
        var entries = new List<byte[]>();
        for (int i = 0; i < cpus; i++) entries.Add([0, (byte)i, 0x14, (byte)(i == 0 ? 3 : 1), 0, 6, 0, 0, 0xff, 0xfb, 0x8b, 0x07, 0, 0, 0, 0, 0, 0, 0, 0]);
        entries.Add([1, 0, .. "PCI   "u8]);
        entries.Add([1, 1, .. "ISA   "u8]);
        entries.Add([2, IoApicBase, 0x11, 1, 0, 0, 0xc0, 0xfe]);
        for (byte irq = 0; irq < 16; irq++)
            if (irq != 2) entries.Add([3, 0, 0, 0, 1, irq, IoApicBase, irq == 0 ? (byte)2 : irq]);
        // Level, active high: what the interrupt router drives.
        for (int slot = 0; slot < 32; slot++)
            for (int pin = 0; pin < 4; pin++) entries.Add([3, 0, 0xd, 0, 0, (byte)(slot << 2 | pin), IoApicBase, (byte)(20 + Pci.PciHost.Swizzle(slot, pin))]);
        entries.Add([4, 3, 0, 0, 1, 0, 0xff, 0]);
        entries.Add([4, 1, 0, 0, 1, 0, 0xff, 1]);

        byte[] body = [.. entries.SelectMany(static e => e)];
        byte[] table = new byte[16 + 44 + body.Length];
        Span<byte> pointer = table.AsSpan(0, 16), header = table.AsSpan(16, 44);
        "_MP_"u8.CopyTo(pointer);
        WriteUInt32LittleEndian(pointer[4..], address + 16);
        (pointer[8], pointer[9]) = (1, 4);
        pointer[10] = Checksum(pointer);
        "PCMP"u8.CopyTo(header);
        WriteUInt16LittleEndian(header[4..], (ushort)(44 + body.Length));
        header[6] = 4;
        "VMM     VMM         "u8.CopyTo(header[8..]);
        WriteUInt16LittleEndian(header[34..], (ushort)entries.Count);
        WriteUInt32LittleEndian(header[36..], 0xfee00000);
        body.CopyTo(table.AsSpan(60));
        header[7] = Checksum(table.AsSpan(16));
        return table;
    }

    private static byte Checksum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (byte b in bytes) sum += b;
        return (byte)-sum;
    }
}
