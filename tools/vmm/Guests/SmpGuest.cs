using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>Two vCPUs that hand a token to each other for ever; the first starts the second as on a PC, by INIT and start-up interrupts.</summary>
internal static class SmpGuest
{
    /// <summary>u32 the vCPU that has the token, then u32 turns of the first and u32 turns of the second vCPU.</summary>
    internal const ulong StateAddress = 0x8800;

    private const ulong Trampoline = 0x8000, ApicCommandLow = 0xfee00300;
    private const int Init = 0x000c4500, StartUp = 0x000c4600;

    /// <summary>Assembles the flat binary.</summary>
    internal static byte[] Build() => Build(Second(), static a =>
    {
        Label wait = a.CreateLabel();
        a.Label(ref wait);
        a.pause();
        a.cmp(__dword_ptr[rbx], 0);
        a.jne(wait);
        a.inc(__dword_ptr[rbx + 4]);
        a.mov(__dword_ptr[rbx], 1);
        a.jmp(wait);
    });

    /// <summary>Assembles a flat binary for any number of vCPUs, which only spin; the state's first byte counts the started ones.</summary>
    internal static byte[] BuildSpinning() => Build(Spin(), static a =>
    {
        Label here = a.CreateLabel();
        a.Label(ref here);
        a.jmp(here);
    });

    private static byte[] Build(byte[] second, Action<Assembler> first)
    {
        var a = new Assembler(64);
        Label code = a.CreateLabel();
        a.lea(rsi, __[code]);
        a.mov(rdi, Trampoline);
        a.mov(ecx, second.Length);
        a.rep.movsb();
        a.mov(ebx, (uint)StateAddress);
        a.mov(__dword_ptr[rbx], 0);
        a.mov(rax, 0xfee000f0);
        a.mov(__dword_ptr[rax], 0x1ff); // Enable the local APIC.
        a.mov(rax, ApicCommandLow);
        a.mov(__dword_ptr[rax], Init);
        a.mov(__dword_ptr[rax], StartUp | (int)(Trampoline >> 12));
        a.mov(__dword_ptr[rax], StartUp | (int)(Trampoline >> 12));
        first(a);
        a.Label(ref code);
        a.db(second);
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    private static byte[] Spin()
    {
        var a = new Assembler(16);
        Label here = a.CreateLabel();
        a.xor(ax, ax);
        a.mov(ds, ax);
        a.mov(bx, unchecked((short)StateAddress));
        a.@lock.inc(__byte_ptr[bx]);
        a.Label(ref here);
        a.jmp(here);
        return GuestImage.Assemble(a, Trampoline);
    }

    /// <summary>Assembles the second vCPU's code, which a start-up interrupt starts in real mode.</summary>
    private static byte[] Second()
    {
        var a = new Assembler(16);
        Label wait = a.CreateLabel();
        a.xor(ax, ax);
        a.mov(ds, ax);
        a.mov(bx, unchecked((short)StateAddress));
        a.Label(ref wait);
        a.pause();
        a.cmp(__dword_ptr[bx], 1);
        a.jne(wait);
        a.inc(__dword_ptr[bx + 8]);
        a.mov(__dword_ptr[bx], 0);
        a.jmp(wait);
        return GuestImage.Assemble(a, Trampoline);
    }
}
