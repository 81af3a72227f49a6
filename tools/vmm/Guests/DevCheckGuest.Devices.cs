using Iced.Intel;
using Vmm.Tools.Devices;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

// The checks of each device.
internal static partial class DevCheckGuest
{
    internal const uint EduId = 0x11e81234;

    private static readonly (string Name, uint Id, Action<Code> Check)[] s_devices =
    [
        ("edu", EduId, CheckEdu), ("gpio-pci-idio-16", 0x0dc8494f, CheckGpio), ("sample", 0xbeefdead, CheckSample),
        ("dma-test", (uint)DmaTestRegisters.DeviceId << 16 | DmaTestRegisters.VendorId, CheckDmaTest),
    ];

    private static void CheckEdu(Code c)
    {
        Assembler a = c.A;
        c.WriteConfig(0x40, 0); // Switch MSI off: the round before may have left it on.
        a.mov(rdi, __qword_ptr[rbx + Bars]);
        a.cmp(__dword_ptr[rdi], (int)EduDevice.Identification);
        c.Check(101);
        a.mov(__dword_ptr[rdi + 4], 0x12345678);
        a.cmp(__dword_ptr[rdi + 4], ~0x12345678);
        c.Check(102);
        a.mov(__dword_ptr[rdi + 8], 10);
        c.Await(103, () => { a.mov(eax, __dword_ptr[rdi + 0x20]); a.test(al, 1); });
        a.cmp(__dword_ptr[rdi + 8], 3628800);
        c.Check(104);

        c.UnmaskPins();
        Action pin = c.OneMore(Pins);
        a.mov(__dword_ptr[rdi + 0x60], 2);
        c.Await(105, pin);
        a.cmp(__dword_ptr[rdi + 0x24], 2);
        c.Check(106);
        a.mov(__dword_ptr[rdi + 0x64], 2);
        a.cmp(__dword_ptr[rdi + 0x24], 0);
        c.Check(107);
        // The line is down, but may rise once more: a pin that is routed through eventfds is signalled again after an EOI, and the EOI came before the
        // device was quiet.
        Label again = a.CreateLabel(), quiet = a.CreateLabel();
        a.mov(r8d, 4);
        a.Label(ref again);
        a.mov(r15, __qword_ptr[rbx + Pins]);
        c.UnmaskPins();
        a.sti();
        a.nop();
        a.cli();
        a.cmp(__qword_ptr[rbx + Pins], r15);
        a.je(quiet);
        a.dec(r8d);
        a.jne(again);
        a.cmp(r8d, 1);
        a.Label(ref quiet);
        c.Check(108);

        c.ReadConfig(0x40);
        a.cmp(al, 5);
        c.Check(109);
        EnableEduMessages(c);
        Action message = c.OneMore(Messages);
        a.mov(__dword_ptr[rdi + 0x60], 4);
        c.Await(110, message);
        a.mov(__dword_ptr[rdi + 0x64], 4);

        Fill(a, Page, 1);
        Fill(a, PageCopy, 0);
        Transfer(a, Page, EduDevice.BufferAt, 1);
        c.Await(111, () => { a.mov(rax, __qword_ptr[rdi + 0x98]); a.test(al, 1); });
        message = c.OneMore(Messages);
        Transfer(a, EduDevice.BufferAt, PageCopy, 7);
        c.Await(112, message);
        a.mov(__dword_ptr[rdi + 0x64], (int)EduDevice.DmaInterrupt);
        ComparePages(a, Page, PageCopy);
        c.Check(113);
    }

    internal static void EnableEduMessages(Code c)
    {
        c.WriteConfig(0x44, Apic);
        c.WriteConfig(0x48, 0);
        c.WriteConfig(0x4c, MessageVector);
        c.WriteConfig(0x40, 0x10000);
    }

    /// <summary>Compares two pages and leaves ecx 0 and the zero flag set when they are equal; uses rax, rcx, rdx and rsi.</summary>
    internal static void ComparePages(Assembler a, ulong one, ulong other)
    {
        Label word = a.CreateLabel(), end = a.CreateLabel();
        a.mov(rsi, one);
        a.mov(rdx, other);
        a.mov(ecx, 512);
        a.Label(ref word);
        a.mov(rax, __qword_ptr[rsi + rcx * 8 - 8]);
        a.cmp(__qword_ptr[rdx + rcx * 8 - 8], rax);
        a.jne(end);
        a.dec(ecx);
        a.jne(word);
        a.Label(ref end);
        a.test(ecx, ecx);
    }

    /// <summary>Checks the count of a pin: after three writes its bit is set again.</summary>
    private static void CheckGpio(Code c)
    {
        Assembler a = c.A;
        foreach ((int writes, int level, int number) in new[] { (0, 0xff, 201), (1, 0xfe, 202), (2, 0xff, 203) })
        {
            a.mov(rdx, __qword_ptr[rbx + Bars + 16]);
            for (int i = 0; i < writes; i++)
            {
                a.mov(al, 1);
                a.@out(dx, al);
            }
            a.inc(edx);
            a.@in(al, dx);
            a.cmp(al, (sbyte)level);
            c.Check(number);
        }
    }

    /// <summary>Checks everything but the timer, which writes to addresses that the device chooses.</summary>
    private static void CheckSample(Code c)
    {
        Assembler a = c.A;
        foreach ((int offset, int number) in new[] { (0, 301), (0x1800, 302), (0x2ffc, 303) })
        {
            a.mov(rdx, __qword_ptr[rbx + Bars + 8]);
            a.add(edx, offset);
            a.mov(eax, __dword_ptr[rbx]);
            a.xor(eax, unchecked((int)0xcafe0000) + number);
            a.mov(ecx, eax);
            a.@out(dx, eax);
            a.xor(eax, eax);
            a.@in(eax, dx);
            a.cmp(eax, ecx);
            c.Check(number);
        }
    }

    private static void CheckDmaTest(Code c)
    {
        Assembler a = c.A;
        a.mov(rdi, __qword_ptr[rbx + Bars]);
        a.cmp(__dword_ptr[rdi + (int)DmaTestRegisters.Id], (int)DmaTestRegisters.IdValue);
        c.Check(401);
        // This memory is mapped into the guest if the accelerator and the device allow it.
        a.mov(rsi, __qword_ptr[rbx + Bars + 16]);
        a.mov(rax, __qword_ptr[rbx]);
        a.mov(__qword_ptr[rsi + 0x1008], rax);
        a.cmp(__qword_ptr[rsi + 0x1008], rax);
        c.Check(402);

        // MSI-X: the first entry of the table in BAR 1, then the enable bit.
        a.mov(rsi, __qword_ptr[rbx + Bars + 8]);
        a.mov(eax, Apic);
        a.mov(__dword_ptr[rsi], eax);
        a.mov(__dword_ptr[rsi + 4], 0);
        a.mov(__dword_ptr[rsi + 8], MessageVector);
        a.mov(__dword_ptr[rsi + 12], 0);
        c.ReadConfig(0x40);
        a.cmp(al, 0x11);
        c.Check(403);
        c.WriteConfig(0x40, 0x80000000);

        a.mov(rsi, Page);
        a.mov(__qword_ptr[rsi], 0);
        Register(a, DmaTestRegisters.Base, Page);
        Register(a, DmaTestRegisters.Length, 4096);
        Register(a, DmaTestRegisters.Rate, 4096); // One block a second, of which the first comes at once.
        a.mov(__dword_ptr[rdi + (int)DmaTestRegisters.InterruptEvery], 1);
        Register(a, DmaTestRegisters.Sequence, 7);
        Action message = c.OneMore(Messages);
        a.mov(__dword_ptr[rdi + (int)DmaTestRegisters.Control], 1);
        c.Await(404, message);
        a.mov(__dword_ptr[rdi + (int)DmaTestRegisters.Control], 0);
        a.mov(rsi, Page);
        a.cmp(__qword_ptr[rsi], 7);
        c.Check(405);
        a.mov(rax, DmaTestPattern.Mix(7 + (8UL << 40)));
        a.cmp(__qword_ptr[rsi + 8], rax);
        c.Check(406);
    }

    private static void Register(Assembler a, ulong register, ulong value)
    {
        a.mov(rax, value);
        a.mov(__qword_ptr[rdi + (int)register], rax);
    }

    internal static void Transfer(Assembler a, ulong from, ulong to, ulong command)
    {
        Register(a, 0x80, from);
        Register(a, 0x88, to);
        Register(a, 0x90, EduDevice.BufferBytes);
        Register(a, 0x98, command);
    }

    private static void Fill(Assembler a, ulong page, int factor)
    {
        Label word = a.CreateLabel();
        a.mov(rdx, page);
        a.mov(ecx, 512);
        a.Label(ref word);
        a.imul(rax, rcx, factor * 0x01010101);
        a.mov(__qword_ptr[rdx + rcx * 8 - 8], rax);
        a.dec(ecx);
        a.jne(word);
    }
}
