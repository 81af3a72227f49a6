using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>
/// A guest that walks memory for ever: in each round it checks on every page what it wrote in the round before, writes this round's words, and
/// looks how far its TSC has moved, so that it sees its own downtime. What it found is in a page of its own.
/// </summary>
internal static class MemCheckGuest
{
    /// <summary>Where the guest keeps what it found: rounds, errors, first bad address, largest TSC gap, last TSC, steps back in time.</summary>
    internal const ulong StateAddress = 0x180000;

    /// <summary>First page it works on.</summary>
    internal const ulong FirstAddress = 0x200000;

    private const long Mix = unchecked((long)0x9e3779b97f4a7c15);
    private const int LastWord = 4088, RoundsPerDot = 16, SerialPort = 0x3f8;

    /// <summary>What the guest found so far.</summary>
    /// <param name="Rounds">Rounds begun.</param>
    /// <param name="Errors">Words that were not what it wrote.</param>
    /// <param name="FirstBad">Address of the first, or 0.</param>
    /// <param name="MaxGapTicks">Largest distance of two looks at the TSC since the gap was last cleared.</param>
    /// <param name="BackSteps">Looks at which the TSC was behind the one before.</param>
    internal readonly record struct Found(ulong Rounds, ulong Errors, ulong FirstBad, ulong MaxGapTicks, ulong BackSteps);

    /// <summary>The flat binary.</summary>
    /// <param name="endAddress">End of the memory to work on.</param>
    internal static byte[] Build(ulong endAddress)
    {
        var a = new Assembler(64);
        Label round = a.CreateLabel(), page = a.CreateLabel(), write = a.CreateLabel(), bad = a.CreateLabel(), bad2 = a.CreateLabel(), forward = a.CreateLabel(), small = a.CreateLabel(), next = a.CreateLabel();
        a.mov(rbx, StateAddress);
        a.mov(rbp, Mix);
        a.rdtsc();
        a.shl(rdx, 32);
        a.or(rax, rdx);
        a.mov(__qword_ptr[rbx + 32], rax);
        a.xor(r8d, r8d);
        a.Label(ref round);
        a.mov(r9, r8);
        a.imul(r9, rbp); // What the last round wrote, apart from the address.
        a.inc(r8);
        a.mov(__qword_ptr[rbx], r8);
        a.mov(r10, r8);
        a.imul(r10, rbp);
        a.mov(rdi, FirstAddress);
        a.Label(ref page);
        a.cmp(r8, 1);
        a.je(write);
        a.mov(rax, r9);
        a.xor(rax, rdi);
        a.cmp(__qword_ptr[rdi], rax);
        a.jne(bad);
        a.cmp(__qword_ptr[rdi + LastWord], rax);
        a.jne(bad);
        a.Label(ref write);
        a.mov(rax, r10);
        a.xor(rax, rdi);
        a.mov(__qword_ptr[rdi], rax);
        a.mov(__qword_ptr[rdi + LastWord], rax);
        a.rdtsc();
        a.shl(rdx, 32);
        a.or(rax, rdx);
        a.mov(rcx, rax);
        a.sub(rax, __qword_ptr[rbx + 32]);
        a.mov(__qword_ptr[rbx + 32], rcx);
        a.jns(forward);
        a.inc(__qword_ptr[rbx + 40]);
        a.jmp(small);
        a.Label(ref forward);
        a.cmp(rax, __qword_ptr[rbx + 24]);
        a.jbe(small);
        a.mov(__qword_ptr[rbx + 24], rax);
        a.Label(ref small);
        a.add(rdi, 4096);
        a.cmp(rdi, (int)endAddress);
        a.jb(page);
        a.test(r8, RoundsPerDot - 1);
        a.jne(round);
        a.mov(dx, SerialPort);
        a.mov(al, (byte)'.');
        a.@out(dx, al);
        a.jmp(round);
        a.Label(ref bad);
        a.inc(__qword_ptr[rbx + 8]);
        a.cmp(__qword_ptr[rbx + 16], 0);
        a.jne(bad2);
        a.mov(__qword_ptr[rbx + 16], rdi);
        a.Label(ref bad2);
        a.jmp(write);
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    /// <summary>Reads what a stopped or running guest found.</summary>
    internal static Found Read(GuestMemory memory)
    {
        byte[] state = new byte[48];
        memory.Read(new GuestAddress(StateAddress), state);
        ulong Word(int i) => BinaryPrimitives.ReadUInt64LittleEndian(state.AsSpan(i * 8));
        return new Found(Word(0), Word(1), Word(2), Word(3), Word(5));
    }

    /// <summary>Makes the guest look for its largest gap anew; the guest must be stopped.</summary>
    internal static void ClearGap(GuestMemory memory) => memory.Write(new GuestAddress(StateAddress + 24), new byte[8]);
}
