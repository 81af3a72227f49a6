using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>
/// A guest that walks memory for ever: in each round it checks on every page what it wrote in the round before, writes this round's words, and
/// looks how far its TSC and its kvm-clock have moved, so that it sees its own downtime. What it found is in a page of its own.
/// </summary>
internal static class MemCheckGuest
{
    /// <summary>
    /// Where the guest keeps what it found: rounds, errors, first bad address, largest TSC gap, last TSC, steps back of it; then largest gap, last
    /// time and steps back of kvm-clock, and whether it has one; then how often it was stopped, the gap of the last stop by both clocks, by both
    /// the gap before the last; the time stolen from its vCPU as of the last look, before and after the last stop, and as of the look before the last.
    /// </summary>
    internal const ulong StateAddress = 0x180000;

    /// <summary>Length of what it keeps.</summary>
    internal const int StateBytes = 152;

    /// <summary>First page it works on.</summary>
    internal const ulong FirstAddress = 0x200000;

    /// <summary>What a round's number is multiplied with.</summary>
    internal const long Mix = unchecked((long)0x9e3779b97f4a7c15);

    /// <summary>Where the host counts the ns for which it kept the vCPU waiting (<c>struct kvm_steal_time</c>), if it does.</summary>
    internal const ulong StealAddress = 0x182000;

    internal const ulong ClockPage = 0x181000;
    private const uint KvmFeatures = 0x40000001, ClockMsr = 0x4b564d01, StealMsr = 0x4b564d03;
    private const int HasClock = 1 << 3, HasSteal = 1 << 5;
    internal const int ClockFlags = 29, WasStopped = 1 << 1; // Set by the host when it starts the guest again (PVCLOCK_GUEST_STOPPED), cleared by the guest.
    private const int LastWord = 4088, RoundsPerDot = 16, SerialPort = 0x3f8;

    /// <summary>What the guest found so far.</summary>
    /// <param name="Rounds">Rounds begun.</param>
    /// <param name="Errors">Words that were not what it wrote.</param>
    /// <param name="FirstBad">Address of the first, or 0.</param>
    /// <param name="MaxGapTicks">Largest distance of two looks at the TSC.</param>
    /// <param name="BackSteps">Looks at which the TSC or kvm-clock was behind the one before.</param>
    /// <param name="MaxClockGapNs">The largest distance by kvm-clock, null without one.</param>
    /// <param name="Stops">How often kvm-clock said that the guest had been stopped.</param>
    /// <param name="StopGapTicks">The distance of two looks with the last stop between them, by TSC.</param>
    /// <param name="StopGapNs">The same by kvm-clock.</param>
    /// <param name="StolenBeforeNs">What the host had stolen from its vCPU at the look before that gap, or a little earlier.</param>
    /// <param name="StolenAfterNs">The same at the look after it.</param>
    internal readonly record struct Found(ulong Rounds, ulong Errors, ulong FirstBad, ulong MaxGapTicks, ulong BackSteps, ulong? MaxClockGapNs, ulong Stops,
        ulong StopGapTicks, ulong StopGapNs, ulong StolenBeforeNs, ulong StolenAfterNs)
    {
        /// <summary>Reads it from the bytes at <see cref="StateAddress"/>.</summary>
        internal static Found Of(ReadOnlySpan<byte> state)
        {
            Span<ulong> words = stackalloc ulong[StateBytes / 8];
            for (int i = 0; i < words.Length; i++) words[i] = BinaryPrimitives.ReadUInt64LittleEndian(state[(i * 8)..]);
            return new Found(words[0], words[1], words[2], words[3], words[5] + words[8], words[9] != 0 ? words[6] : null, words[10], words[11], words[12], words[16], words[17]);
        }
    }

    /// <summary>The flat binary.</summary>
    /// <param name="endAddress">End of the memory to work on.</param>
    internal static byte[] Build(ulong endAddress)
    {
        var a = new Assembler(64);
        Label round = a.CreateLabel(), page = a.CreateLabel(), clockless = a.CreateLabel();
        StartClock(a);
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
        CheckPage(a, errors: 8, firstBad: 16);
        a.mov(esi, (uint)ClockPage);
        a.movzx(r12d, __byte_ptr[rsi + ClockFlags]); // Before the look: what it says then lies in this gap or at the end of the one before.
        a.rdtsc();
        a.shl(rdx, 32);
        a.or(rax, rdx);
        Look(a, gap: 24, last: 32, back: 40, keep: r13);
        a.cmp(__qword_ptr[rbx + 72], 0);
        a.je(clockless);
        ReadClock(a);
        Look(a, gap: 48, last: 56, back: 64, keep: r14);
        NoteStop(a);
        a.Label(ref clockless);
        a.add(rdi, 4096);
        a.cmp(rdi, (int)endAddress);
        a.jb(page);
        a.test(r8, RoundsPerDot - 1);
        a.jne(round);
        a.mov(dx, SerialPort);
        a.mov(al, (byte)'.');
        a.@out(dx, al);
        a.jmp(round);
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    /// <summary>
    /// Compares the page at rdi with what the last round wrote, unless this is the first, and writes what this one does: r8 is the round, r9 and r10
    /// are what they write apart from the address. Counts and the first bad address are at these places of the page at rbx. Uses rax.
    /// </summary>
    internal static void CheckPage(Assembler a, int errors, int firstBad)
    {
        Label write = a.CreateLabel(), bad = a.CreateLabel();
        a.cmp(r8, 1);
        a.je(write);
        a.mov(rax, r9);
        a.xor(rax, rdi);
        a.cmp(__qword_ptr[rdi], rax);
        a.jne(bad);
        a.cmp(__qword_ptr[rdi + LastWord], rax);
        a.je(write);
        a.Label(ref bad);
        a.inc(__qword_ptr[rbx + errors]);
        a.cmp(__qword_ptr[rbx + firstBad], 0);
        a.jne(write);
        a.mov(__qword_ptr[rbx + firstBad], rdi);
        a.Label(ref write);
        a.mov(rax, r10);
        a.xor(rax, rdi);
        a.mov(__qword_ptr[rdi], rax);
        a.mov(__qword_ptr[rdi + LastWord], rax);
    }

    /// <summary>Reads what a stopped or running guest found.</summary>
    internal static Found Read(GuestMemory memory)
    {
        byte[] state = new byte[StateBytes];
        memory.Read(new GuestAddress(StateAddress), state);
        return Found.Of(state);
    }

    /// <summary>Asks for a kvm-clock if there is one, and notes the time.</summary>
    private static void StartClock(Assembler a)
    {
        StartClock(a, has: 72, last: 56);
        StartSteal(a);
    }

    /// <summary>As the other, with places of the caller's in the page at rbx.</summary>
    internal static void StartClock(Assembler a, int has, int last)
    {
        Label none = a.CreateLabel();
        Enable(a, HasClock, ClockMsr, ClockPage, none);
        a.mov(__qword_ptr[rbx + has], 1);
        ReadClock(a);
        a.mov(__qword_ptr[rbx + last], rax);
        a.Label(ref none);
        a.nop();
    }

    private static void StartSteal(Assembler a)
    {
        Label none = a.CreateLabel();
        Enable(a, HasSteal, StealMsr, StealAddress, none);
        a.Label(ref none);
        a.nop();
    }

    /// <summary>Asks KVM to keep something at an address, if it has the feature; leaves the guest's page in rbx.</summary>
    private static void Enable(Assembler a, int feature, uint msr, ulong address, Label none)
    {
        a.mov(eax, KvmFeatures);
        a.cpuid();
        a.mov(rbx, StateAddress);
        a.test(eax, feature);
        a.je(none);
        a.mov(ecx, msr);
        a.mov(eax, (uint)address | 1);
        a.xor(edx, edx);
        a.wrmsr();
    }

    /// <summary>Nanoseconds into rax, as the structure's version allows; uses rcx, rdx and r11.</summary>
    internal static void ReadClock(Assembler a)
    {
        Label again = a.CreateLabel(), right = a.CreateLabel(), shifted = a.CreateLabel();
        a.mov(rsi, ClockPage);
        a.Label(ref again);
        a.mov(r11d, __dword_ptr[rsi]);
        a.test(r11d, 1);
        a.jne(again);
        a.rdtsc();
        a.shl(rdx, 32);
        a.or(rax, rdx);
        a.sub(rax, __qword_ptr[rsi + 8]);
        a.movsx(ecx, __byte_ptr[rsi + 28]);
        a.test(ecx, ecx);
        a.js(right);
        a.shl(rax, cl);
        a.jmp(shifted);
        a.Label(ref right);
        a.neg(ecx);
        a.shr(rax, cl);
        a.Label(ref shifted);
        a.mov(edx, __dword_ptr[rsi + 24]);
        a.mul(rdx);
        a.shr(rax, 32);
        a.shl(rdx, 32);
        a.or(rax, rdx);
        a.add(rax, __qword_ptr[rsi + 16]);
        a.cmp(r11d, __dword_ptr[rsi]);
        a.jne(again);
    }

    /// <summary>If the guest was stopped, the longer of the last two gaps by each clock is that of the stop. Gaps in r13 and r14, flags in r12.</summary>
    private static void NoteStop(Assembler a)
    {
        Label running = a.CreateLabel();
        a.mov(esi, (uint)StealAddress);
        a.mov(r15, __qword_ptr[rsi]);
        a.test(r12d, WasStopped);
        a.je(running);
        a.mov(esi, (uint)ClockPage);
        a.and(__byte_ptr[rsi + ClockFlags], ~WasStopped);
        foreach ((AssemblerRegister64 gap, int before, int to) in ((AssemblerRegister64, int, int)[])[(r13, 104, 88), (r14, 112, 96)])
        {
            a.mov(rax, gap);
            a.cmp(rax, __qword_ptr[rbx + before]);
            a.cmovb(rax, __qword_ptr[rbx + before]);
            a.mov(__qword_ptr[rbx + to], rax);
        }
        a.mov(rax, __qword_ptr[rbx + 120]);
        a.cmp(r13, __qword_ptr[rbx + 104]);
        a.cmovb(rax, __qword_ptr[rbx + 144]);
        a.mov(__qword_ptr[rbx + 128], rax);
        a.mov(__qword_ptr[rbx + 136], r15);
        a.inc(__qword_ptr[rbx + 80]); // Last: who sees the count sees the gap.
        a.Label(ref running);
        a.mov(__qword_ptr[rbx + 104], r13);
        a.mov(__qword_ptr[rbx + 112], r14);
        a.mov(rax, __qword_ptr[rbx + 120]);
        a.mov(__qword_ptr[rbx + 144], rax);
        a.mov(__qword_ptr[rbx + 120], r15);
    }

    /// <summary>Compares a time in rax with the last one, notes it, and keeps the distance.</summary>
    private static void Look(Assembler a, int gap, int last, int back, AssemblerRegister64 keep)
    {
        Label forward = a.CreateLabel(), done = a.CreateLabel();
        a.mov(rcx, rax);
        a.xor(keep, keep);
        a.sub(rax, __qword_ptr[rbx + last]);
        a.mov(__qword_ptr[rbx + last], rcx);
        a.jns(forward);
        a.inc(__qword_ptr[rbx + back]);
        a.jmp(done);
        a.Label(ref forward);
        a.mov(keep, rax);
        a.cmp(rax, __qword_ptr[rbx + gap]);
        a.jbe(done);
        a.mov(__qword_ptr[rbx + gap], rax);
        a.Label(ref done);
        a.nop();
    }
}
