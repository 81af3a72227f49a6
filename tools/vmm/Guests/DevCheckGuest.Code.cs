using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tools.Cli.Guests;

// Building blocks of the checks. rbx: results, r12: slot and function, r13 and r14: next free memory and port, rdi: a BAR.
internal static partial class DevCheckGuest
{
    /// <summary>
    /// Assembles building blocks. <paramref name="onMessage"/> adds code to the handler of interrupts by message; that code saves all registers but rax,
    /// rcx and rdx itself.
    /// </summary>
    internal sealed class Code(Assembler a, Action? onMessage = null)
    {
        private Label _onPin = a.CreateLabel(), _onMessage = a.CreateLabel(), _setPins = a.CreateLabel();

        internal Assembler A => a;

        internal void SetUpInterrupts()
        {
            a.mov(rbx, StateAddress);
            foreach ((Label handler, int first, int count) in new[] { (_onPin, PinVector, PinCount), (_onMessage, MessageVector, 1) })
            {
                a.lea(rax, __[handler]);
                a.mov(ecx, eax);
                a.and(ecx, unchecked((int)0xffff0000));
                a.or(ecx, 0x8e00);
                a.and(eax, 0xffff);
                a.or(eax, 0x100000);
                for (int i = 0; i < count; i++)
                {
                    a.mov(rdx, InterruptTable + (ulong)(16 * (first + i)));
                    a.mov(__dword_ptr[rdx], eax);
                    a.mov(__dword_ptr[rdx + 4], ecx);
                    a.mov(__qword_ptr[rdx + 8], 0);
                }
            }
            a.mov(rdx, InterruptTableRegister);
            a.mov(__word_ptr[rdx], (short)(16 * (MessageVector + 1) - 1));
            a.mov(rax, InterruptTable);
            a.mov(__qword_ptr[rdx + 2], rax);
            a.lidt(__[rdx]);
            a.mov(eax, Apic + 0xf0);
            a.mov(__dword_ptr[rax], 0x1ff);
            UnmaskPins();
        }

        /// <summary>Reads a config register of the present function into eax.</summary>
        internal void ReadConfig(int register)
        {
            ChooseConfig(register);
            a.mov(dx, 0xcfc);
            a.@in(eax, dx);
        }

        /// <summary>Writes ecx to a config register of the present function.</summary>
        internal void WriteConfig(int register)
        {
            ChooseConfig(register);
            a.mov(dx, 0xcfc);
            a.mov(eax, ecx);
            a.@out(dx, eax);
        }

        internal void WriteConfig(int register, uint value)
        {
            a.mov(ecx, value);
            WriteConfig(register);
        }

        /// <summary>Sizes all BARs, maps each at a multiple of its size, records the addresses, and switches decoding and bus mastering on.</summary>
        internal void GiveAddresses()
        {
            WriteConfig(4, 0);
            for (int bar = 0; bar < 6; bar++)
            {
                Label none = a.CreateLabel(), memory = a.CreateLabel();
                int register = 0x10 + 4 * bar;
                WriteConfig(register, uint.MaxValue);
                ReadConfig(register);
                a.test(eax, eax);
                a.je(none);
                a.test(eax, 1);
                a.je(memory);
                Place(r14, ~3, 0xffff);
                WriteConfig(register);
                a.mov(__qword_ptr[rbx + Bars + 8 * bar], rcx);
                a.jmp(none);
                a.Label(ref memory);
                Place(r13, ~15, -1);
                WriteConfig(register);
                a.mov(__qword_ptr[rbx + Bars + 8 * bar], rcx);
                a.Label(ref none);
                a.nop();
            }
            WriteConfig(4, 7);
        }

        /// <summary>Computes the size of a BAR from its value in eax, and puts the next aligned address into ecx.</summary>
        private void Place(AssemblerRegister64 next, int mask, int width)
        {
            a.and(eax, mask);
            a.neg(eax);
            a.and(eax, width);
            a.mov(eax, eax);
            a.lea(rcx, __[next + rax - 1]);
            a.mov(rdx, rax);
            a.neg(rdx);
            a.and(rcx, rdx);
            a.lea(next, __[rcx + rax]);
        }

        /// <summary>Counts a check as held if the zero flag is set.</summary>
        internal void Check(int number)
        {
            Label held = a.CreateLabel(), done = a.CreateLabel();
            a.je(held);
            a.inc(__qword_ptr[rbx + Broken]);
            a.cmp(__qword_ptr[rbx + FirstBroken], 0);
            a.jne(done);
            a.mov(__qword_ptr[rbx + FirstBroken], number);
            a.jmp(done);
            a.Label(ref held);
            a.inc(__qword_ptr[rbx + Held]);
            a.Label(ref done);
            a.nop();
        }

        /// <summary>Waits, with interrupts on, until the condition sets the zero flag, and checks that it did. The condition may use rax and rdx.</summary>
        internal void Await(int number, Action condition)
        {
            Label again = a.CreateLabel(), done = a.CreateLabel();
            a.sti();
            Now();
            a.mov(r8, rax);
            a.mov(r9, PatienceTicks);
            a.Label(ref again);
            condition();
            a.je(done);
            Now();
            a.sub(rax, r8);
            a.cmp(rax, r9);
            a.jb(again);
            a.Label(ref done);
            a.cli();
            condition();
            Check(number);
        }

        /// <summary>Records a counter of interrupts and returns the condition that it has risen by one.</summary>
        internal Action OneMore(int counter)
        {
            a.mov(r15, __qword_ptr[rbx + counter]);
            a.inc(r15);
            return () =>
            {
                a.mov(rax, __qword_ptr[rbx + counter]);
                a.sub(rax, r15);
                a.shr(rax, 63);
            };
        }

        /// <summary>Unmasks the interrupt pins; the first interrupt masks them again.</summary>
        internal void UnmaskPins()
        {
            a.mov(ecx, LevelTriggered);
            a.call(_setPins);
        }

        internal void Print(string text)
        {
            a.mov(dx, 0x3f8);
            foreach (char c in text)
            {
                a.mov(al, (byte)c);
                a.@out(dx, al);
            }
        }

        internal void Handlers()
        {
            a.Label(ref _onPin);
            Save();
            a.inc(__qword_ptr[rbx + Pins]);
            // Mask the pins until the waiting code has quieted the device.
            a.mov(ecx, LevelTriggered | Masked);
            a.call(_setPins);
            Leave();
            a.Label(ref _onMessage);
            Save();
            a.inc(__qword_ptr[rbx + Messages]);
            onMessage?.Invoke();
            Leave();
            a.Label(ref _setPins);
            for (int pin = 0; pin < PinCount; pin++)
            {
                WriteIoApic(0x10 + 2 * (FirstPin + pin), () => a.lea(edx, __[ecx + (PinVector + pin)]));
                WriteIoApic(0x11 + 2 * (FirstPin + pin), () => a.xor(edx, edx));
            }
            a.ret();
        }

        private void Save()
        {
            a.push(rax);
            a.push(rcx);
            a.push(rdx);
        }

        private void Leave()
        {
            a.mov(eax, Apic + 0xb0);
            a.mov(__dword_ptr[rax], 0);
            a.pop(rdx);
            a.pop(rcx);
            a.pop(rax);
            a.iretq();
        }

        private void WriteIoApic(int register, Action value)
        {
            a.mov(eax, IoApic);
            a.mov(__dword_ptr[rax], register);
            value();
            a.mov(__dword_ptr[rax + 0x10], edx);
        }

        private void ChooseConfig(int register)
        {
            a.mov(eax, r12d);
            a.shl(eax, 8);
            a.or(eax, unchecked((int)(0x80000000 | (uint)register)));
            a.mov(dx, 0xcf8);
            a.@out(dx, eax);
        }

        private void Now()
        {
            a.rdtsc();
            a.shl(rdx, 32);
            a.or(rax, rdx);
        }
    }
}
