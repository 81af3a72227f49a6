using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

/// <summary>
/// A guest that drives vmm's devices as a driver does: it finds them in configuration space, maps their BARs, reads and writes their registers, handles
/// their interrupts by pin and by message, and lets them write its memory. It stores its results in a page of its own.
/// </summary>
internal static partial class DevCheckGuest
{
    /// <summary>Address of the results, as u64: rounds, devices, held checks, broken checks, first broken check, interrupts by message, by pin.</summary>
    internal const ulong StateAddress = 0x180000;

    /// <summary>Length of the results.</summary>
    internal const int StateBytes = 56;

    private const int Rounds = 0, Devices = 8, Held = 16, Broken = 24, FirstBroken = 32, Pins = 48;
    internal const int Messages = 40, Bars = 0x100;
    private const ulong InterruptTable = 0x182000, InterruptTableRegister = 0x181ff0;
    internal const ulong Page = 0x190000, PageCopy = 0x191000;
    private const uint IoApic = 0xfec00000;
    internal const uint Apic = 0xfee00000;
    internal const int MessageVector = 0x60;
    private const int PinVector = 0x50, FirstPin = 20, PinCount = 4, LevelTriggered = 0x8000, Masked = 0x10000;
    internal const ulong FirstMemory = 0xe0000000;
    internal const int FirstPort = 0x2000;
    private const ulong PatienceTicks = 40_000_000_000; // Ten seconds or more on any host.

    /// <summary>The guest's results so far.</summary>
    /// <param name="Rounds">Number of rounds done.</param>
    /// <param name="Devices">Number of known devices in the last round.</param>
    /// <param name="Held">Number of checks that held.</param>
    /// <param name="Broken">Number of checks that did not hold.</param>
    /// <param name="FirstBroken">The first of those: the device's number times 100 plus the check's number.</param>
    /// <param name="Messages">Number of interrupts by message.</param>
    /// <param name="Pins">Number of interrupts by pin.</param>
    internal readonly record struct Found(ulong Rounds, ulong Devices, ulong Held, ulong Broken, ulong FirstBroken, ulong Messages, ulong Pins)
    {
        /// <summary>Decodes the bytes at <see cref="StateAddress"/>.</summary>
        internal static Found Of(byte[] state)
        {
            ulong Word(int at) => BinaryPrimitives.ReadUInt64LittleEndian(state.AsSpan(at));
            return new Found(Word(DevCheckGuest.Rounds), Word(DevCheckGuest.Devices), Word(DevCheckGuest.Held), Word(DevCheckGuest.Broken), Word(DevCheckGuest.FirstBroken),
                Word(DevCheckGuest.Messages), Word(DevCheckGuest.Pins));
        }
    }

    /// <summary>Reads the results of a stopped or running guest.</summary>
    internal static Found Read(GuestMemory memory)
    {
        byte[] state = new byte[StateBytes];
        memory.Read(new GuestAddress(StateAddress), state);
        return Found.Of(state);
    }

    /// <summary>Assembles a flat binary that only counts interrupts.</summary>
    internal static byte[] BuildWaiting()
    {
        var a = new Assembler(64);
        var code = new Code(a);
        Label here = a.CreateLabel();
        code.SetUpInterrupts();
        a.sti();
        a.inc(__qword_ptr[rbx + Rounds]);
        a.Label(ref here);
        a.pause();
        a.jmp(here);
        code.Handlers();
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    /// <summary>Assembles the flat binary. With <paramref name="once"/> it powers off after one round, with the number of broken checks as exit code.</summary>
    internal static byte[] Build(bool once)
    {
        var a = new Assembler(64);
        var code = new Code(a);
        code.SetUpInterrupts();
        Label round = a.CreateLabel(), slot = a.CreateLabel(), next = a.CreateLabel();
        a.Label(ref round);
        a.mov(__qword_ptr[rbx + Devices], 0);
        a.mov(r13, FirstMemory);
        a.mov(r14d, FirstPort);
        a.xor(r12d, r12d);
        a.Label(ref slot);
        code.ReadConfig(0);
        a.cmp(eax, -1);
        a.je(next);
        foreach ((string name, uint id, Action<Code> check) in s_devices)
        {
            Label other = a.CreateLabel();
            code.ReadConfig(0);
            a.cmp(eax, (int)id);
            a.jne(other);
            a.inc(__qword_ptr[rbx + Devices]);
            code.GiveAddresses();
            check(code);
            if (once) code.Print($"{name} checked\n");
            a.jmp(next);
            a.Label(ref other);
            a.nop();
        }
        a.Label(ref next);
        a.add(r12d, 8); // The next slot.
        a.cmp(r12d, 256);
        a.jne(slot);
        a.inc(__qword_ptr[rbx + Rounds]);
        if (once)
        {
            a.mov(dx, 0x501);
            a.mov(al, __byte_ptr[rbx + Broken]);
            a.@out(dx, al);
            Label end = a.CreateLabel();
            a.Label(ref end);
            a.jmp(end);
        }
        a.jmp(round);
        code.Handlers();
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }
}
