using Iced.Intel;
using Vmm.Core.Errors;
using Vmm.Core.Kvm;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Tools.Cli.Guests;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>Small guests run on the host's KVM.</summary>
internal sealed class KvmRunTests
{
    [Test]
    public void A_guest_writes_on_its_serial_port_and_switches_itself_off()
    {
        using var guest = new KvmGuest(KvmGuest.Code(static a =>
        {
            foreach (char c in "hello\n") Out(a, 0x3f8, c);
            Out(a, 0x501, 7);
            Forever(a);
        }));
        Assert.That(guest.RunToEnd(), Is.EqualTo(RunState.Shutdown));
        Assert.That((guest.Output, guest.Vm.Requests.ExitCode), Is.EqualTo(("hello\n", 7)));
    }

    [Test]
    public void Memory_that_nobody_has_reads_as_ones_and_swallows_writes()
    {
        using var guest = new KvmGuest(KvmGuest.Code(static a =>
        {
            a.mov(rdi, 0xd0000000);
            a.mov(__qword_ptr[rdi], rdi);
            a.mov(rax, __qword_ptr[rdi]);
            a.mov(__qword_ptr[0x180000], rax);
            Out(a, 0x501, 1);
            Forever(a);
        }));
        guest.RunToEnd();
        byte[] read = new byte[8];
        guest.Vm.Memory.Read(new GuestAddress(0x180000), read);
        Assert.That(read, Is.All.EqualTo(0xff));
    }

    [Test]
    public void A_triple_fault_starts_the_guest_again()
    {
        using var guest = new KvmGuest(KvmGuest.Code(static a =>
        {
            Label second = a.CreateLabel();
            a.cmp(__qword_ptr[0x180000], 0);
            a.jne(second);
            a.mov(__qword_ptr[0x180000], 1);
            a.ud2(); // The guest has no interrupt table, so this ends in a triple fault.
            a.Label(ref second);
            Out(a, 0x501, 2);
            Forever(a);
        }));
        var off = new TaskCompletionSource();
        guest.Vm.RunState.Changed += (_, to) => { if (to == RunState.Shutdown) off.TrySetResult(); };
        guest.Vm.Cont();
        Assert.That(off.Task.Wait(KvmGuest.Deadline));
        Assert.That(guest.Vm.Requests.ExitCode, Is.EqualTo(2));
    }

    [Test]
    public void A_stopped_guest_does_nothing_and_goes_on_where_it_was()
    {
        using var guest = KvmGuest.MemCheck();
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => guest.Found.Rounds > 3, "three rounds");
        for (int i = 0; i < 20; i++)
        {
            guest.Vm.Stop();
            ulong rip = guest.Kvm.Vcpus[0].GetRegs().Rip, rounds = guest.Found.Rounds;
            Assert.That((guest.Kvm.Vcpus[0].GetRegs().Rip, guest.Found.Rounds), Is.EqualTo((rip, rounds)));
            guest.Vm.Cont();
            KvmGuest.WaitFor(() => guest.Found.Rounds > rounds, "another round");
        }
        guest.Vm.Stop();
        Assert.That((guest.Found.Errors, guest.Found.BackSteps), Is.EqualTo((0ul, 0ul)));
    }

    [Test]
    public void Two_vCPUs_hand_a_token_to_each_other()
    {
        using var guest = new KvmGuest(SmpGuest.Build(), cpus: 2);
        uint Turns(int of)
        {
            byte[] word = new byte[4];
            guest.Vm.Memory.Read(new GuestAddress(SmpGuest.StateAddress + 4 + 4 * (ulong)of), word);
            return BitConverter.ToUInt32(word);
        }
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => Turns(1) > 100, "100 turns of the second vCPU");
        guest.Vm.Stop();
        Assert.That(Turns(0), Is.EqualTo(Turns(1)).Within(1));
    }

    [Test]
    public void A_missing_device_node_says_what_to_do()
    {
        KvmException e = Assert.Throws<KvmException>(static () => KvmSystem.Open("/nonexistent/kvm"))!;
        Assert.That((e.Errno, e.Hint), Is.EqualTo((Errno.ENOENT, e.Hint)));
        Assert.That(e.Hint, Does.Contain("run without KVM"));
    }

    private static void Out(Assembler a, ushort port, int value)
    {
        a.mov(dx, (short)port);
        a.mov(al, (byte)value);
        a.@out(dx, al);
    }

    private static void Forever(Assembler a)
    {
        Label here = a.CreateLabel();
        a.Label(ref here);
        a.jmp(here);
    }
}
