using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Registry;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tests.Unit.Cli;

/// <summary>A serial console makes its terminal raw while the guest runs, and restores the user's mode however the run ends.</summary>
internal sealed class SerialTerminalTests : EndToEnd
{
    private const uint Isig = 1, Icanon = 2, Echo = 8;

    [Test]
    public async Task The_terminal_is_raw_while_the_guest_runs_and_the_users_after([Values("quit", "SIGTERM", "SIGINT", "SIGHUP", "SIGTERM twice")] string end)
    {
        using var pty = new Pty();
        byte[] usual = pty.Mode;
        PeerProcess vm = await Vmm.StartVmOf("vm", "4M", "--device", $"serial,input={pty.Path}");
        Assert.That(pty.LocalFlags & (Icanon | Echo | Isig), Is.EqualTo(Isig), "the terminal is raw, and Ctrl-C still sends a signal");
        switch (end)
        {
            case "quit": await Vmm.Ok("quit", "--vm", "vm"); break;
            case "SIGTERM twice":
                Posix.Kill(vm.Pid, SigTerm);
                Posix.Kill(vm.Pid, SigTerm);
                break;
            default: Posix.Kill(vm.Pid, end switch { "SIGTERM" => SigTerm, "SIGINT" => SigInt, _ => 1 }); break;
        }
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        await vm.WaitForExit(limit.Token);
        Assert.That(pty.Mode, Is.EqualTo(usual));
    }

    [Test]
    public async Task The_terminal_is_the_users_while_the_VM_is_stopped_and_when_it_has_moved_away()
    {
        using var pty = new Pty();
        byte[] usual = pty.Mode;
        await Vmm.StartVmOf("vm", "4M", "--device", $"serial,input={pty.Path}");
        byte[] raw = pty.Mode;
        await Vmm.Ok("stop", "--vm", "vm");
        Assert.That(pty.Mode, Is.EqualTo(usual).And.Not.EqualTo(raw));
        await Vmm.Ok("cont", "--vm", "vm");
        Assert.That(pty.Mode, Is.EqualTo(raw));
        await Vmm.Ok("migrate", "--vm", "vm", "--to", $"file:{Vmm["state"]}");
        Assert.That(pty.Mode, Is.EqualTo(usual));
    }

    [Test]
    public async Task A_guest_gets_each_key_as_it_is_typed_on_the_terminal_of_stdin_and_shows_what_it_likes()
    {
        KvmGuest.Require();
        using var pty = new Pty();
        byte[] usual = pty.Mode;
        using VmmCommands.Running vm = await StartEcho(pty);
        foreach (char key in "aHAL8")
        {
            pty.Type((byte)key);
            Assert.That((char)pty.Shown(), Is.EqualTo((char)(key + 1)), "the terminal neither echoes the key nor waits for the end of the line");
        }
        vm.Signal(SigTerm);
        Assert.That((await vm.Finish()).Error, Does.Contain("ready:"));
        Assert.That(pty.Mode, Is.EqualTo(usual));
    }

    /// <summary>Starts a guest on a terminal; the guest answers each key with the next character.</summary>
    private async Task<VmmCommands.Running> StartEcho(Pty pty)
    {
        string kernel = Vmm["echo"];
        await File.WriteAllBytesAsync(kernel, Successor());
        VmmCommands.Running vm = Vmm.StartThrough(["sh"], $"export TERM=dumb; exec \"$@\" <{pty.Path} >{pty.Path}", "run", "--name", "vm", "--memory", "4M", "--accel", "kvm", "--kernel", kernel,
            "--device", "serial,input=/dev/stdin,output=/dev/stdout");
        await vm.Line("ready:");
        return vm;
    }

    [Test]
    public async Task A_guest_reads_the_terminal_of_stdin_in_the_next_process_too([Values] bool exec)
    {
        KvmGuest.Require();
        using var pty = new Pty();
        byte[] usual = pty.Mode;
        using VmmCommands.Running vm = await StartEcho(pty);
        pty.Type((byte)'a');
        Assert.That((char)pty.Shown(), Is.EqualTo('b'));
        await Vmm.Ok(["update", "--vm", "vm", .. exec ? (string[])["--exec"] : []]);
        if (!exec) Assert.That(SpinWait.SpinUntil(() => VmEntry.ReadStartTicks(vm.Pid) is null, VmmCommands.Deadline), "the old process ends");
        foreach (char key in "HAL8")
        {
            pty.Type((byte)key);
            Assert.That((char)pty.Shown(), Is.EqualTo((char)(key + 1)));
        }
        await Vmm.Ok("quit", "--vm", "vm");
        await vm.Finish();
        Assert.That(pty.Mode, Is.EqualTo(usual));
    }

    /// <summary>A guest that answers each received byte with that byte plus one.</summary>
    internal static byte[] Successor() => KvmGuest.Code(static a =>
    {
        Iced.Intel.Label wait = a.CreateLabel();
        a.Label(ref wait);
        a.mov(dx, 0x3fd);
        a.@in(al, dx);
        a.test(al, 1);
        a.je(wait);
        a.mov(dx, 0x3f8);
        a.@in(al, dx);
        a.inc(al);
        a.@out(dx, al);
        a.jmp(wait);
    });
}
