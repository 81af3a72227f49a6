using static System.Buffers.Binary.BinaryPrimitives;

namespace Vmm.Core.Kvm;

/// <summary>
/// The smallest set of ACPI 2.0 tables from which a stock kernel learns of all vCPUs, the I/O APIC, the PCI bus with its interrupt lines, and how to
/// switch off: RSDP, XSDT, FADT with fixed registers at <see cref="Devices.AcpiPower.Port"/>, FACS, MADT and a DSDT of two names.
/// </summary>
internal static class AcpiTables
{
    private const int RsdpBytes = 64, FacsBytes = 64, HeaderBytes = 36, FadtBytes = 244;
    private const byte SystemIo = 1;
    private const ulong PciWindow = 0xc000_0000, PciWindowEnd = 0xfec0_0000;

    /// <summary>Builds all tables for an address below 4 GiB that is a multiple of 64. The first table is the RSDP.</summary>
    internal static byte[] Build(uint address, int cpus)
    {
        var all = new List<byte>(new byte[RsdpBytes]);
        uint facs = Add(Facs()), dsdt = Add(Table("DSDT", 2, Dsdt())), fadt = Add(Table("FACP", 3, Fadt(facs, dsdt))), madt = Add(Table("APIC", 3, Madt(cpus)));
        byte[] pointers = new byte[16];
        WriteUInt64LittleEndian(pointers, fadt);
        WriteUInt64LittleEndian(pointers.AsSpan(8), madt);
        uint xsdt = Add(Table("XSDT", 1, pointers));
        byte[] result = [.. all];
        Rsdp(result.AsSpan(0, 36), xsdt);
        return result;

        uint Add(byte[] table)
        {
            uint at = address + (uint)all.Count;
            all.AddRange(table);
            all.AddRange(new byte[-table.Length & 63]);
            return at;
        }
    }

    private static void Rsdp(Span<byte> rsdp, uint xsdt)
    {
        "RSD PTR "u8.CopyTo(rsdp);
        "VMM   "u8.CopyTo(rsdp[9..]);
        rsdp[15] = 2;
        WriteInt32LittleEndian(rsdp[20..], rsdp.Length);
        WriteUInt64LittleEndian(rsdp[24..], xsdt);
        rsdp[8] = Checksum(rsdp[..20]);
        rsdp[32] = Checksum(rsdp);
    }

    private static byte[] Facs()
    {
        byte[] facs = new byte[FacsBytes];
        "FACS"u8.CopyTo(facs);
        WriteInt32LittleEndian(facs.AsSpan(4), FacsBytes);
        facs[32] = 1;
        return facs;
    }

    private static byte[] Fadt(uint facs, uint dsdt)
    {
        const int flags = 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10; // WBINVD, C1, no fixed buttons, reset register.
        byte[] table = new byte[FadtBytes];
        WriteUInt32LittleEndian(table.AsSpan(36), facs);
        WriteUInt32LittleEndian(table.AsSpan(40), dsdt);
        WriteUInt16LittleEndian(table.AsSpan(46), Devices.AcpiPower.Irq);
        WriteUInt32LittleEndian(table.AsSpan(56), Devices.AcpiPower.Port);
        WriteUInt32LittleEndian(table.AsSpan(64), Devices.AcpiPower.ControlPort);
        (table[88], table[89]) = (4, 2);
        WriteUInt16LittleEndian(table.AsSpan(96), 0xfff); // No C2 and no C3.
        WriteUInt16LittleEndian(table.AsSpan(98), 0xfff);
        table[108] = Devices.Cmos.CenturyIndex;
        WriteUInt16LittleEndian(table.AsSpan(109), 1 | 2 | 4); // Legacy devices, a keyboard controller, no VGA.
        WriteInt32LittleEndian(table.AsSpan(112), flags);
        Register(table.AsSpan(116), 8, 1, Devices.LegacyDevices.ResetPort);
        table[128] = 6;
        WriteUInt64LittleEndian(table.AsSpan(132), facs);
        WriteUInt64LittleEndian(table.AsSpan(140), dsdt);
        Register(table.AsSpan(148), 32, 2, Devices.AcpiPower.Port);
        Register(table.AsSpan(172), 16, 2, Devices.AcpiPower.ControlPort);
        return table[HeaderBytes..];

        static void Register(Span<byte> at, byte bits, byte access, ushort port)
        {
            (at[0], at[1], at[3]) = (SystemIo, bits, access);
            WriteUInt64LittleEndian(at[4..], port);
        }
    }

    private static byte[] Madt(int cpus)
    {
        List<byte> table = [.. U32(0xfee00000), .. U32(1)];
        for (int i = 0; i < cpus; i++) table.AddRange([0, 8, (byte)i, (byte)i, .. U32(1)]);
        table.AddRange([1, 12, 0, 0, .. U32(0xfec00000), .. U32(0)]);
        table.AddRange([2, 10, 0, 0, .. U32(2), 0, 0]); // The PIT's interrupt 0 is pin 2, as on every PC.
        table.AddRange([2, 10, 0, (byte)Devices.AcpiPower.Irq, .. U32(Devices.AcpiPower.Irq), 0xd, 0]); // Level, active high.
        table.AddRange([4, 6, 0xff, 0, 0, 1]);
        return [.. table];
    }

    /// <summary>Name(\_S5, {5, 5}) and Device(\_SB.PCI0) with _HID, _UID, _BBN, _CRS and _PRT: pins 20 to 23, by the bus's swizzle.</summary>
    private static byte[] Dsdt()
    {
        var routes = new List<byte[]>();
        for (int slot = 0; slot < Pci.PciHost.Slots; slot++)
            for (int pin = 0; pin < Pci.PciHost.IntxLines; pin++)
                routes.Add(Package([0x0c, .. U32((uint)slot << 16 | 0xffff)], [0x0a, (byte)pin], [0], [0x0a, (byte)(KvmAccelerator.FirstIntxIrq + Pci.PciHost.Swizzle(slot, pin))]));
        byte[] resources =
        [
            .. Word(2, 0, 0, 0), // Bus 0.
            0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8, // Configuration mechanism #1.
            .. Word(1, 3, 0, 0x0cf7), .. Word(1, 3, 0x0d00, 0xffff),
            0x87, 23, 0, 0, 0x0c, 1, .. U32(0), .. U32((uint)PciWindow), .. U32((uint)(PciWindowEnd - 1)), .. U32(0), .. U32((uint)(PciWindowEnd - PciWindow)),
            0x79, 0,
        ];
        byte[] device =
        [
            .. "PCI0"u8, .. Name("_HID", [0x0c, 0x41, 0xd0, 0x0a, 0x03]), .. Name("_UID", [0]), .. Name("_BBN", [0]),
            .. Name("_CRS", [0x11, .. Sized([0x0b, (byte)resources.Length, (byte)(resources.Length >> 8), .. resources])]), .. Name("_PRT", Package([.. routes])),
        ];
        return [.. Name("_S5_", Package([0x0a, Devices.AcpiPower.SleepOff], [0x0a, Devices.AcpiPower.SleepOff])), 0x10, .. Sized([0x5c, .. "_SB_"u8, 0x5b, 0x82, .. Sized(device)])];

        static byte[] Word(byte type, byte flags, int first, int last) =>
            [0x88, 13, 0, type, 0x0c, flags, 0, 0, (byte)first, (byte)(first >> 8), (byte)last, (byte)(last >> 8), 0, 0, (byte)(last - first + 1), (byte)((last - first + 1) >> 8)];
    }

    private static byte[] Name(string name, byte[] value) => [0x08, .. System.Text.Encoding.ASCII.GetBytes(name), .. value];

    private static byte[] Package(params byte[][] elements) => [0x12, .. Sized([(byte)elements.Length, .. elements.SelectMany(static e => e)])];

    /// <summary>Prefixes content with AML's package length, which counts its own bytes: one byte up to 63, else 4 bits and up to three more bytes.</summary>
    private static byte[] Sized(byte[] content)
    {
        if (content.Length + 1 < 0x40) return [(byte)(content.Length + 1), .. content];
        int more = content.Length + 2 < 0x1000 ? 1 : 2, length = content.Length + 1 + more;
        return [(byte)(more << 6 | (length & 0xf)), .. Enumerable.Range(0, more).Select(i => (byte)(length >> (4 + 8 * i))), .. content];
    }

    private static byte[] Table(string signature, byte revision, byte[] body)
    {
        byte[] table = new byte[HeaderBytes + body.Length];
        System.Text.Encoding.ASCII.GetBytes(signature).CopyTo(table, 0);
        WriteInt32LittleEndian(table.AsSpan(4), table.Length);
        table[8] = revision;
        "VMM   VMM     "u8.CopyTo(table.AsSpan(10));
        table[24] = 1;
        "VMM "u8.CopyTo(table.AsSpan(28));
        table[32] = 1;
        body.CopyTo(table.AsSpan(HeaderBytes));
        table[9] = Checksum(table);
        return table;
    }

    private static byte[] U32(uint value) => [(byte)value, (byte)(value >> 8), (byte)(value >> 16), (byte)(value >> 24)];

    private static byte Checksum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (byte b in bytes) sum += b;
        return (byte)-sum;
    }
}
