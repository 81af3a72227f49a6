using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>
/// A guest that walks memory for ever: in each round it checks on every page what it wrote in the round before, writes this round's words, and reads
/// its TSC and kvm-clock, whose jumps show its own downtime. It stores its results in a page of its own.
/// </summary>
internal static class MemCheckGuest
{
    /// <summary>
    /// Address of the results, as u64 from 0: rounds, errors, first bad address; of the TSC from 24 the largest gap, last reading, steps back; the same of
    /// kvm-clock from 48, and at 72 whether there is one; at 80 the number of stops; the gap of the last stop by TSC at 88, by kvm-clock at 96; the
    /// gap before the present one by both from 104; stolen time at the last reading at 120, before and after the last stop from 128, at the reading
    /// before the last at 144.
    /// </summary>
    internal const ulong StateAddress = 0x180000;

    /// <summary>Length of the results.</summary>
    internal const int StateBytes = 152;

    /// <summary>First page that it checks.</summary>
    internal const ulong FirstAddress = 0x200000;

    /// <summary>Factor that makes a round's words of the round's number.</summary>
    internal const long Mix = unchecked((long)0x9e3779b97f4a7c15);

    /// <summary>Address at which the host, if it can, counts the ns for which the vCPU waited (<c>struct kvm_steal_time</c>).</summary>
    internal const ulong StealAddress = 0x182000;

    internal const ulong ClockPage = 0x181000;
    private const uint KvmFeatures = 0x40000001, ClockMsr = 0x4b564d01, StealMsr = 0x4b564d03;
    private const int HasClock = 1 << 3, HasSteal = 1 << 5;
    internal const int ClockFlags = 29, WasStopped = 1 << 1; // Set by the host when it starts the guest again (PVCLOCK_GUEST_STOPPED), cleared by the guest.
    private const int LastWord = 4088, RoundsPerDot = 16, SerialPort = 0x3f8;

    /// <summary>The guest's results so far.</summary>
    /// <param name="Rounds">Number of rounds begun.</param>
    /// <param name="Errors">Number of words that differed from what the guest wrote.</param>
    /// <param name="FirstBad">Address of the first such word, or 0.</param>
    /// <param name="MaxGapTicks">Largest difference of two readings of the TSC.</param>
    /// <param name="BackSteps">How often the TSC or kvm-clock was behind its reading before.</param>
    /// <param name="MaxClockGapNs">Largest difference of two readings of kvm-clock; null without one.</param>
    /// <param name="Stops">How often kvm-clock reported that the guest had been stopped.</param>
    /// <param name="StopGapTicks">The difference of the two TSC readings around the last stop.</param>
    /// <param name="StopGapNs">The same of kvm-clock.</param>
    /// <param name="StolenBeforeNs">Stolen time of the vCPU at the reading before that stop, or a little earlier.</param>
    /// <param name="StolenAfterNs">Stolen time at the reading after that stop.</param>
    internal readonly record struct Found(ulong Rounds, ulong Errors, ulong FirstBad, ulong MaxGapTicks, ulong BackSteps, ulong? MaxClockGapNs, ulong Stops,
        ulong StopGapTicks, ulong StopGapNs, ulong StolenBeforeNs, ulong StolenAfterNs)
    {
        /// <summary>Decodes the bytes at <see cref="StateAddress"/>.</summary>
        internal static Found Of(ReadOnlySpan<byte> state)
        {
            Span<ulong> words = stackalloc ulong[StateBytes / 8];
            for (int i = 0; i < words.Length; i++) words[i] = BinaryPrimitives.ReadUInt64LittleEndian(state[(i * 8)..]);
            return new Found(words[0], words[1], words[2], words[3], words[5] + words[8], words[9] != 0 ? words[6] : null, words[10], words[11], words[12], words[16], words[17]);
        }
    }

    /// <summary>Assembles the flat binary, which checks memory up to <paramref name="endAddress"/>.</summary>
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
        a.imul(r9, rbp); // What the last round wrote, without the address.
        a.inc(r8);
        a.mov(__qword_ptr[rbx], r8);
        a.mov(r10, r8);
        a.imul(r10, rbp);
        a.mov(rdi, FirstAddress);
        a.Label(ref page);
        CheckPage(a, errors: 8, firstBad: 16);
        a.mov(esi, (uint)ClockPage);
        a.movzx(r12d, __byte_ptr[rsi + ClockFlags]); // Read before the clocks: the stop that it reports is in this gap or the one before.
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
    /// Compares the page at rdi with what the last round wrote, unless this is the first round, and writes this round's words. r8 is the round; r9 and r10
    /// are the words of the last and of this round, without the address. Results go to these offsets of the page at rbx. Uses rax.
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

    /// <summary>Reads the results of a stopped or running guest.</summary>
    internal static Found Read(GuestMemory memory)
    {
        byte[] state = new byte[StateBytes];
        memory.Read(new GuestAddress(StateAddress), state);
        return Found.Of(state);
    }

    /// <summary>Enables kvm-clock if there is one, and records the time.</summary>
    private static void StartClock(Assembler a)
    {
        StartClock(a, has: 72, last: 56);
        StartSteal(a);
    }

    /// <summary>The same, with the caller's offsets in the page at rbx.</summary>
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

    /// <summary>Makes KVM maintain a structure at an address if it has the feature; leaves the address of the results in rbx.</summary>
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

    /// <summary>Reads kvm-clock, ns, into rax, and retries while the structure's version changes. Uses rcx, rdx and r11.</summary>
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

    /// <summary>After a stop records, for each clock, the longer of the last two gaps as that of the stop. Gaps in r13 and r14, flags in r12.</summary>
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
        a.inc(__qword_ptr[rbx + 80]); // Written last, so that a reader of the count finds the gap.
        a.Label(ref running);
        a.mov(__qword_ptr[rbx + 104], r13);
        a.mov(__qword_ptr[rbx + 112], r14);
        a.mov(rax, __qword_ptr[rbx + 120]);
        a.mov(__qword_ptr[rbx + 144], rax);
        a.mov(__qword_ptr[rbx + 120], r15);
    }

    /// <summary>Compares a time in rax with the last one, records it, and leaves the difference in <paramref name="keep"/>.</summary>
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
