namespace Vmm.Core.Pci;

/// <summary>Offsets and bits of the type 0 configuration header (QEMU: <c>pci_regs.h</c>'s <c>PCI_*</c>).</summary>
public static class PciRegisters
{
    /// <summary>Vendor id, u16.</summary>
    public const int VendorId = 0x00;
    /// <summary>Device id, u16.</summary>
    public const int DeviceId = 0x02;
    /// <summary>Command, u16; <see cref="PciCommand"/>.</summary>
    public const int Command = 0x04;
    /// <summary>Status, u16.</summary>
    public const int Status = 0x06;
    /// <summary>Revision, u8.</summary>
    public const int RevisionId = 0x08;
    /// <summary>Programming interface, u8.</summary>
    public const int ClassProg = 0x09;
    /// <summary>Class, u16.</summary>
    public const int ClassDevice = 0x0a;
    /// <summary>Cache line size, u8.</summary>
    public const int CacheLineSize = 0x0c;
    /// <summary>Header type, u8; bit 7 is <see cref="HeaderTypeMultiFunction"/>.</summary>
    public const int HeaderType = 0x0e;
    /// <summary>First of six BARs, u32 each.</summary>
    public const int BaseAddress0 = 0x10;
    /// <summary>Subsystem vendor id, u16.</summary>
    public const int SubsystemVendorId = 0x2c;
    /// <summary>Subsystem id, u16.</summary>
    public const int SubsystemId = 0x2e;
    /// <summary>Expansion ROM, u32.</summary>
    public const int RomAddress = 0x30;
    /// <summary>Offset of the first capability, u8.</summary>
    public const int CapabilityList = 0x34;
    /// <summary>Interrupt line, u8; firmware and guest note the line here, no hardware reads it.</summary>
    public const int InterruptLine = 0x3c;
    /// <summary>Interrupt pin, u8: 0 none, 1 to 4 for A to D.</summary>
    public const int InterruptPin = 0x3d;
    /// <summary>Length of the standard header, and the first offset that a capability may have.</summary>
    public const int HeaderBytes = 0x40;

    /// <summary>Status: the function asserts INTx.</summary>
    public const ushort StatusInterrupt = 0x0008;
    /// <summary>Status: the function has a capability chain.</summary>
    public const ushort StatusCapabilityList = 0x0010;
    /// <summary>Status: bits that a write of 1 clears.</summary>
    public const ushort StatusWriteOneToClear = 0xf900;
    /// <summary>Header type: the slot has more than one function.</summary>
    public const byte HeaderTypeMultiFunction = 0x80;
    /// <summary>ROM BAR: the ROM decodes.</summary>
    public const uint RomEnable = 1;
    /// <summary>ROM BAR: address bits.</summary>
    public const uint RomAddressMask = 0xfffff800;
    /// <summary>Power management capability: control and status, u16.</summary>
    public const int PowerControl = 4;
    /// <summary>Power state bits of <see cref="PowerControl"/>; 0 is D0.</summary>
    public const ushort PowerStateMask = 3;
}

/// <summary>Bits of the command register.</summary>
[Flags]
public enum PciCommand
{
    /// <summary>Nothing decodes.</summary>
    None = 0,
    /// <summary>I/O BARs decode.</summary>
    Io = 1,
    /// <summary>Memory BARs decode.</summary>
    Memory = 2,
    /// <summary>The function may master the bus: DMA and MSI.</summary>
    Master = 4,
    /// <summary>The function reports errors on SERR#.</summary>
    SystemError = 0x100,
    /// <summary>The function does not drive INTx.</summary>
    IntxDisable = 0x400,
}

/// <summary>Ids of the capabilities that this product uses.</summary>
public static class PciCapabilityId
{
    /// <summary>Power management.</summary>
    public const byte PowerManagement = 0x01;
    /// <summary>MSI.</summary>
    public const byte Msi = 0x05;
    /// <summary>Vendor specific; byte 2 is its length.</summary>
    public const byte VendorSpecific = 0x09;
    /// <summary>PCI Express.</summary>
    public const byte Express = 0x10;
    /// <summary>MSI-X.</summary>
    public const byte Msix = 0x11;
}

/// <summary>The type bits of a BAR, as in its register.</summary>
[Flags]
public enum PciBarType
{
    /// <summary>Memory below 4 GiB.</summary>
    Memory32 = 0,
    /// <summary>I/O ports.</summary>
    Io = 1,
    /// <summary>Memory at any address; the BAR takes the next register too.</summary>
    Memory64 = 4,
    /// <summary>Reading the memory has no side effects.</summary>
    Prefetchable = 8,
}

/// <summary>A base address register: one address range of a function. Only <see cref="Address"/> changes.</summary>
/// <param name="number">0 to 5, or <see cref="Rom"/>.</param>
/// <param name="type">Type bits of its register.</param>
/// <param name="sizeBytes">A power of two.</param>
public sealed class PciBar(int number, PciBarType type, ulong sizeBytes)
{
    /// <summary>Number of the expansion ROM (QEMU: <c>PCI_ROM_SLOT</c>).</summary>
    public const int Rom = 6;

    /// <summary>0 to 5, or <see cref="Rom"/>.</summary>
    public int Number => number;

    /// <summary>Type bits.</summary>
    public PciBarType Type => type;

    /// <summary>Size of the range, a power of two.</summary>
    public ulong SizeBytes => sizeBytes;

    /// <summary>True for ports, false for memory.</summary>
    public bool IsIo => (type & PciBarType.Io) != 0;

    /// <summary>True if the BAR takes two registers.</summary>
    public bool Is64Bit => !IsIo && (type & PciBarType.Memory64) != 0;

    /// <summary>The address at which it decodes now; null while it does not decode. BQL: held.</summary>
    public ulong? Address { get; internal set; }

    internal int Register => number == Rom ? PciRegisters.RomAddress : PciRegisters.BaseAddress0 + 4 * number;

    /// <summary>
    /// Reads the address from the registers (QEMU: <c>pci_bar_address</c>). Address 0, a range that wraps, and a 32-bit range that ends at 4 GiB decode
    /// nowhere.
    /// </summary>
    internal ulong? AddressFrom(PciConfigSpace config)
    {
        var command = (PciCommand)config.GetUInt16(PciRegisters.Command);
        if ((command & (IsIo ? PciCommand.Io : PciCommand.Memory)) == 0) return null;
        ulong at = Is64Bit ? config.GetUInt64(Register) : config.GetUInt32(Register);
        if (number == Rom && (at & PciRegisters.RomEnable) == 0) return null;
        at &= ~(sizeBytes - 1);
        ulong last = at + (sizeBytes - 1);
        if (at == 0 || last <= at || last == ulong.MaxValue || (!Is64Bit && last >= uint.MaxValue)) return null;
        return at;
    }
}
