using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Memory;
using Vmm.Tools.Devices;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>
/// A guest for tests of migration and update. It walks all RAM for ever, checks on every page what it wrote in the round before, and records how far
/// its kvm-clock jumped. If there is an edu function, it reads a page and writes it back by DMA all the time: the interrupt of each transfer starts
/// the next one, so a lost interrupt ends the chain. The guest stores its results in a page of its own.
/// </summary>
internal static class BusyGuest
{
    /// <summary>Address of the guest's results.</summary>
    internal const ulong StateAddress = DevCheckGuest.StateAddress;

    /// <summary>Length of the results.</summary>
    internal const int StateBytes = 0x258;

    // On some hosts reading the TSC causes a VM exit, which costs as much as checking many pages.
    private const int PagesPerLook = 8;
    private const int Rounds = 0x200, Errors = 0x208, FirstBad = 0x210, BackSteps = 0x218, HasClock = 0x220, LastClock = 0x228, WrongPages = 0x230, IsBack = 0x238, StopGap = 0x240,
        IsStopGapOpen = 0x248, Stops = 0x250;

    /// <summary>The guest's results so far.</summary>
    /// <param name="Rounds">Number of rounds begun.</param>
    /// <param name="Errors">Number of words that differed from what the guest wrote.</param>
    /// <param name="FirstBad">Address of the first such word, or 0.</param>
    /// <param name="BackSteps">How often kvm-clock was behind its reading before.</param>
    /// <param name="WrongPages">Number of pages that came back from the device with other bytes.</param>
    /// <param name="Interrupts">Number of interrupts from the device.</param>
    /// <param name="ClockNs">The last reading of kvm-clock; 0 without one.</param>
    /// <param name="Stops">How often kvm-clock reported that the guest had been stopped.</param>
    /// <param name="StopGapNs">The jump of kvm-clock over the last stop.</param>
    internal readonly record struct Found(ulong Rounds, ulong Errors, ulong FirstBad, ulong BackSteps, ulong WrongPages, ulong Interrupts, long ClockNs, long Stops, long StopGapNs)
    {
        /// <summary>Decodes the bytes at <see cref="StateAddress"/>.</summary>
        internal static Found Of(byte[] state)
        {
            long Word(int at) => BinaryPrimitives.ReadInt64LittleEndian(state.AsSpan(at));
            return new Found((ulong)Word(BusyGuest.Rounds), (ulong)Word(BusyGuest.Errors), (ulong)Word(BusyGuest.FirstBad), (ulong)Word(BusyGuest.BackSteps), (ulong)Word(BusyGuest.WrongPages),
                (ulong)Word(DevCheckGuest.Messages), Word(BusyGuest.HasClock) == 0 ? 0 : Word(LastClock), Word(BusyGuest.Stops), Word(StopGap));
        }
    }

    /// <summary>Reads the results of a stopped or running guest.</summary>
    internal static Found Read(GuestMemory memory)
    {
        byte[] state = new byte[StateBytes];
        memory.Read(new GuestAddress(StateAddress), state);
        return Found.Of(state);
    }

    /// <summary>Assembles the flat binary.</summary>
    /// <param name="blocks">Sizes of the RAM blocks.</param>
    internal static byte[] Build(IReadOnlyList<ulong> blocks)
    {
        var a = new Assembler(64);
        var code = new DevCheckGuest.Code(a, () => OnMessage(a));
        code.SetUpInterrupts();
        MemCheckGuest.StartClock(a, HasClock, LastClock);
        StartDevice(code);
        a.sti();
        a.mov(rbp, MemCheckGuest.Mix);
        a.xor(r8d, r8d);
        Label round = a.CreateLabel();
        a.Label(ref round);
        a.mov(r9, r8);
        a.imul(r9, rbp); // What the last round wrote, without the address.
        a.inc(r8);
        a.mov(__qword_ptr[rbx + Rounds], r8);
        a.mov(r10, r8);
        a.imul(r10, rbp);
        ulong end = 0;
        foreach (ulong size in blocks)
        {
            ulong start = GuestMemory.NextAddress(end, size, aroundDevices: true).Value;
            end = start + size;
            if (end > MemCheckGuest.FirstAddress) Walk(a, Math.Max(start, MemCheckGuest.FirstAddress), end);
        }
        a.jmp(round);
        code.Handlers();
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    private static void Walk(Assembler a, ulong start, ulong end)
    {
        Label page = a.CreateLabel(), clockless = a.CreateLabel();
        a.mov(rdi, start);
        a.mov(r15, end);
        a.Label(ref page);
        MemCheckGuest.CheckPage(a, Errors, FirstBad);
        a.test(edi, (PagesPerLook - 1) << 12);
        a.jne(clockless);
        a.cmp(__qword_ptr[rbx + HasClock], 0);
        a.je(clockless);
        MemCheckGuest.ReadClock(a);
        NoteGap(a, clockless);
        a.Label(ref clockless);
        a.add(rdi, 4096);
        a.cmp(rdi, r15);
        a.jb(page);
    }

    /// <summary>
    /// Compares a time in rax with the last one. If the clock reports a stop, this difference contains the stop. If the stop came between the reading of
    /// the time and of the flag, the next difference contains it, so the greater of the two is kept.
    /// </summary>
    private static void NoteGap(Assembler a, Label done)
    {
        Label forward = a.CreateLabel(), closed = a.CreateLabel(), lesser = a.CreateLabel();
        a.mov(rcx, rax);
        a.sub(rax, __qword_ptr[rbx + LastClock]);
        a.mov(__qword_ptr[rbx + LastClock], rcx);
        a.jns(forward);
        a.inc(__qword_ptr[rbx + BackSteps]);
        a.jmp(done);
        a.Label(ref forward);
        a.cmp(__qword_ptr[rbx + IsStopGapOpen], 0);
        a.je(closed);
        a.mov(__qword_ptr[rbx + IsStopGapOpen], 0);
        a.cmp(__qword_ptr[rbx + StopGap], rax);
        a.jae(lesser);
        a.mov(__qword_ptr[rbx + StopGap], rax);
        a.Label(ref lesser);
        a.inc(__qword_ptr[rbx + Stops]); // Written last, so that a reader of the count finds the gap.
        a.Label(ref closed);
        a.mov(esi, (uint)MemCheckGuest.ClockPage);
        a.test(__byte_ptr[rsi + MemCheckGuest.ClockFlags], MemCheckGuest.WasStopped);
        a.je(done);
        a.and(__byte_ptr[rsi + MemCheckGuest.ClockFlags], ~MemCheckGuest.WasStopped);
        a.mov(__qword_ptr[rbx + StopGap], rax);
        a.mov(__qword_ptr[rbx + IsStopGapOpen], 1);
    }

    /// <summary>Looks for an edu function and starts the first transfer.</summary>
    private static void StartDevice(DevCheckGuest.Code code)
    {
        Assembler a = code.A;
        Label slot = a.CreateLabel(), next = a.CreateLabel(), done = a.CreateLabel();
        a.mov(r13, DevCheckGuest.FirstMemory);
        a.mov(r14d, DevCheckGuest.FirstPort);
        a.xor(r12d, r12d);
        a.Label(ref slot);
        code.ReadConfig(0);
        a.cmp(eax, (int)DevCheckGuest.EduId);
        a.jne(next);
        code.GiveAddresses();
        DevCheckGuest.EnableEduMessages(code);
        a.mov(rdi, __qword_ptr[rbx + DevCheckGuest.Bars]);
        DevCheckGuest.Transfer(a, DevCheckGuest.Page, EduDevice.BufferAt, 5);
        a.jmp(done);
        a.Label(ref next);
        a.add(r12d, 8);
        a.cmp(r12d, 256);
        a.jne(slot);
        a.Label(ref done);
        a.nop();
    }

    /// <summary>Starts the next transfer. Checks a page that has come back first, and sends another one.</summary>
    private static void OnMessage(Assembler a)
    {
        Label isBack = a.CreateLabel(), right = a.CreateLabel(), done = a.CreateLabel(), word = a.CreateLabel();
        a.push(rdi);
        a.push(rsi);
        a.mov(rdi, __qword_ptr[rbx + DevCheckGuest.Bars]);
        a.mov(__dword_ptr[rdi + 0x64], (int)EduDevice.DmaInterrupt);
        a.xor(__qword_ptr[rbx + IsBack], 1);
        a.je(isBack);
        DevCheckGuest.Transfer(a, EduDevice.BufferAt, DevCheckGuest.PageCopy, 7);
        a.jmp(done);
        a.Label(ref isBack);
        DevCheckGuest.ComparePages(a, DevCheckGuest.Page, DevCheckGuest.PageCopy);
        a.je(right);
        a.inc(__qword_ptr[rbx + WrongPages]);
        a.Label(ref right);
        a.mov(rsi, DevCheckGuest.Page);
        a.mov(ecx, 512);
        a.Label(ref word);
        a.mov(rax, __qword_ptr[rbx + DevCheckGuest.Messages]);
        a.imul(rax, rax, 0x01010101);
        a.xor(rax, rcx);
        a.mov(__qword_ptr[rsi + rcx * 8 - 8], rax);
        a.dec(ecx);
        a.jne(word);
        DevCheckGuest.Transfer(a, DevCheckGuest.Page, EduDevice.BufferAt, 5);
        a.Label(ref done);
        a.pop(rsi);
        a.pop(rdi);
    }
}
