using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>
/// A multiboot guest for QEMU's machine <c>pc</c> that writes one word to random pages at a rate and halts in between: the cheapest guest that dirties
/// as many pages as vmm's workload. The ACPI timer gives the time; 1000 interrupts of the PIT a second wake the guest. What it did not manage within
/// 100 ms it drops, as the workload does.
/// </summary>
internal static class WriterGuest
{
    private const uint LoadAddress = 0x100000, DataAddress = 0x180000, StackTop = 0x1f0000, FirstPage = 0x400000, TopBytes = 4 << 20;
    private const int TimerPort = 0x608, TimerHz = 3_579_545, PitHz = 1_193_182, TicksPerSecond = 1000, Vector = 0x20;
    private const uint Magic = 0x1badb002, HasAddresses = 1 << 16;

    /// <summary>Assembles the image.</summary>
    /// <param name="ramBytes">Size of RAM; the guest leaves out what is below 4 MiB and the firmware's tables at the top.</param>
    /// <param name="rateMBps">10^6 bytes of pages a second.</param>
    internal static byte[] Build(long ramBytes, int rateMBps)
    {
        var a = new Assembler(32);
        Label start = a.CreateLabel();
        // The header: magic, flags, checksum, header address, load address, load end, end of bss (both 0: the whole file), entry.
        uint[] header = [Magic, HasAddresses, unchecked(0 - Magic - HasAddresses), LoadAddress, LoadAddress, 0, 0, LoadAddress + 32];
        foreach (uint word in header) a.dd(word);
        a.Label(ref start);
        a.cli();
        a.mov(esp, StackTop);
        Tables(a);
        Interrupts(a);
        uint pages = (uint)((Math.Min(ramBytes, 3L << 30) - FirstPage - TopBytes) >> 12);
        WriteForever(a, pages, pagesPer65536Ticks: (uint)Math.Round(rateMBps * 1e6 / 4096 / TimerHz * 65536));
        using var stream = new MemoryStream();
        a.Assemble(new StreamCodeWriter(stream), LoadAddress);
        return stream.ToArray();
    }

    /// <summary>A GDT like the one that the loader had (its own may be gone), and an IDT with one gate, whose handler is in the data page too.</summary>
    private static void Tables(Assembler a)
    {
        const uint Gdt = DataAddress, Idt = DataAddress + 0x100, Pointer = DataAddress + 0x800, Handler = DataAddress + 0x900;
        // Handler: push eax; mov al, 0x20; out 0x20, al; pop eax; iret.
        Words(a, Handler, [0xe620b050, 0x00cf5820]);
        Words(a, Gdt + 8, [0x0000ffff, 0x00cf9a00, 0x0000ffff, 0x00cf9200]);
        Words(a, Idt + (Vector * 8), [(8u << 16) | (Handler & 0xffff), (Handler & 0xffff0000) | 0x8e00]);
        Words(a, Pointer, [(Gdt << 16) | 23, Gdt >> 16, (Idt << 16) | ((Vector + 1) * 8 - 1), Idt >> 16]);
        a.lgdt(__fword_ptr[Pointer]);
        a.lidt(__fword_ptr[Pointer + 8]);
    }

    private static void Words(Assembler a, uint address, uint[] words)
    {
        for (int i = 0; i < words.Length; i++) a.mov(__dword_ptr[address + (i * 4)], words[i]);
    }

    private static void Interrupts(Assembler a)
    {
        // Both PICs from vector 0x20 on, only IRQ 0 let through; then the PIT's rate.
        foreach ((int port, int value) in ((int, int)[])[(0x20, 0x11), (0xa0, 0x11), (0x21, Vector), (0xa1, Vector + 8), (0x21, 4), (0xa1, 2), (0x21, 1), (0xa1, 1), (0x21, 0xfe), (0xa1, 0xff),
            (0x43, 0x34), (0x40, PitHz / TicksPerSecond & 0xff), (0x40, PitHz / TicksPerSecond >> 8)])
        {
            a.mov(al, (sbyte)value);
            a.@out((byte)port, al);
        }
    }

    private static void WriteForever(Assembler a, uint pages, uint pagesPer65536Ticks)
    {
        Label wait = a.CreateLabel(), page = a.CreateLabel();
        a.mov(ebp, pages);
        a.mov(ebx, pagesPer65536Ticks);
        a.mov(edi, 1); // The random number.
        a.xor(esi, esi); // Pages due, in 1/65536.
        a.mov(edx, TimerPort);
        a.@in(eax, dx);
        a.mov(__dword_ptr[DataAddress + 0xa00], eax);
        a.sti();
        a.Label(ref wait);
        a.hlt();
        a.mov(edx, TimerPort);
        a.@in(eax, dx);
        a.mov(ecx, eax);
        a.sub(eax, __dword_ptr[DataAddress + 0xa00]);
        a.mov(__dword_ptr[DataAddress + 0xa00], ecx);
        a.and(eax, 0xffffff);
        a.mov(ecx, TimerHz / 10);
        a.cmp(eax, ecx);
        a.cmova(eax, ecx);
        a.mul(ebx);
        a.add(esi, eax);
        a.Label(ref page);
        a.cmp(esi, 0x10000);
        a.jb(wait);
        a.sub(esi, 0x10000);
        a.imul(edi, edi, 1664525);
        a.add(edi, 1013904223);
        a.mov(eax, edi);
        a.mul(ebp);
        a.shl(edx, 12);
        a.mov(__dword_ptr[edx + FirstPage], edi);
        a.jmp(page);
    }
}
