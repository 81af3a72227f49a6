namespace Vmm.Tools.Devices;

/// <summary>BAR0 of <see cref="DmaTestDevice"/>: offsets and bits. Registers are 4 or 8 bytes, little-endian, at their own width.</summary>
public static class DmaTestRegisters
{
    public const ushort VendorId = 0x1b36, DeviceId = 0xd3a7;
    public const uint IdValue = 0x54414d44; // "DMAT"

    /// <summary>u32 ro: <see cref="IdValue"/>.</summary>
    public const ulong Id = 0x00;
    /// <summary>u32 rw: bit 0 runs the engine.</summary>
    public const ulong Control = 0x04;
    /// <summary>u32 ro: bit 0 an error stopped the engine, bit 1 the engine waits for memory that it cannot access, bit 2 the interrupt line is up.</summary>
    public const ulong Status = 0x08;
    /// <summary>u32 ro: errno of the last DMA that failed.</summary>
    public const ulong ErrorNumber = 0x0c;
    /// <summary>u64 rw: DMA address of the range that the engine writes.</summary>
    public const ulong Base = 0x10;
    /// <summary>u64 rw: length of the range; the engine uses only whole blocks.</summary>
    public const ulong Length = 0x18;
    /// <summary>u64 rw: bytes a second; 0 for no limit.</summary>
    public const ulong Rate = 0x20;
    /// <summary>u32 rw: bytes of one write, multiple of 8 up to 64 KiB; power-on 4096.</summary>
    public const ulong Block = 0x28;
    /// <summary>u32 rw: number of writes from interrupt to interrupt; 0 for no interrupts.</summary>
    public const ulong InterruptEvery = 0x2c;
    /// <summary>u64 rw: number of the next block.</summary>
    public const ulong Sequence = 0x30;
    /// <summary>u64 ro: number of interrupts raised.</summary>
    public const ulong Interrupts = 0x38;
    /// <summary>u64 ro: size of the internal state in bytes.</summary>
    public const ulong StateSize = 0x40;
    /// <summary>u64 ro: CRC-32C of the internal state.</summary>
    public const ulong StateChecksum = 0x48;
    /// <summary>u32 ro: number of states loaded from another device.</summary>
    public const ulong Loads = 0x50;
    /// <summary>u32 wo: any write lowers the interrupt line.</summary>
    public const ulong Acknowledge = 0x54;
    /// <summary>128 bytes rw, any width.</summary>
    public const ulong Scratch = 0x80;
    public const int ScratchBytes = 128;

    public const uint ControlRun = 1, StatusError = 1, StatusStalled = 2, StatusInterrupt = 4;
}
