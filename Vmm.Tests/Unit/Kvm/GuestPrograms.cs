using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>Guests that only tests need.</summary>
internal static class GuestPrograms
{
    /// <summary>Writes a counter to the serial port's scratch register and reads it back, for ever; counts wrong answers at 0x180000.</summary>
    internal static byte[] PortCounter() => KvmGuest.Code(static a =>
    {
        Label next = a.CreateLabel();
        a.mov(dx, 0x3ff);
        a.Label(ref next);
        a.inc(cl);
        a.mov(al, cl);
        a.@out(dx, al);
        a.xor(eax, eax);
        a.@in(al, dx);
        a.cmp(al, cl);
        a.je(next);
        a.inc(__qword_ptr[0x180000]);
        a.jmp(next);
    });
}
