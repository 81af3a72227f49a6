using System.Net.Sockets;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Migration.Qmp;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Hosting;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>After <c>vmm update</c> the VM runs in the new process or, if that process fails in any way, still in the old one.</summary>
[TestFixture]
internal sealed class UpdateTests : EndToEnd
{
    private static readonly string[] s_guest = ["--memory", "1M,id=ticks", "--device", "ticker,block=ticks", "--workload", "pattern,block=ram,rate=10M,prefill=on", "--device", "scratch"];

    /// <summary>A RAM block that no rehearsal has, so that its name identifies the real new process.</summary>
    private static readonly string[] s_mark = ["--memory", "1M,id=mark"];

    private static readonly string[] s_withDevice = ["--memory", "64M,id=ram", .. s_guest, .. s_mark];

    [Test]
    public async Task TheVmGoesOnInAnotherProcessUnderTheSameNameTwice()
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        int before = vm.Pid;
        for (int i = 0; i < 2; i++)
        {
            JsonNode result = JsonNode.Parse(await Vmm.Ok("update", "--vm", "a", "--json"))!;
            JsonNode listed = JsonNode.Parse(await Vmm.Ok("list", "--json"))![0]!;
            Assert.That(result["pid"]!.GetValue<int>(), Is.Not.EqualTo(before));
            Assert.That(listed["pid"]!.GetValue<int>(), Is.EqualTo(before = result["pid"]!.GetValue<int>()));
            Assert.That(listed["status"]!.ToString(), Is.EqualTo("running"));
            Assert.That(result["bytes"]!.GetValue<long>(), Is.LessThan(16 << 10));
        }
        await Vmm.Ok("stop", "--vm", "a");
        JsonNode stopped = JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!;
        Assert.That(stopped["status"]!.ToString(), Is.EqualTo("paused"));
        await Vmm.Ok("update", "--vm", "a");
        Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!["status"]!.ToString(), Is.EqualTo("paused"), "a stopped VM stays stopped");
        await Vmm.Ok("quit", "--vm", "a");
        Assert.That(SpinWait.SpinUntil(() => !Vmm.Registered.Any(), VmmCommands.Deadline), "a VM that quits removes its entry");
    }

    [Test]
    public async Task WhatIsSetForMigrationsDoesNotMatterToAnUpdate([Values] bool exec)
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        await vm.Monitor.Execute("migrate-set-capabilities", new JsonObject
        {
            ["capabilities"] = new JsonArray([.. ((string[])["multifd", "events", "pause-before-switchover", "return-path", "switchover-ack"]).Select(static c => new JsonObject { ["capability"] = c, ["state"] = true })]),
        }, CancellationToken.None);
        await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        await Vmm.Ok("quit", "--vm", "a");
    }

    [Test]
    public async Task AProcessThatReplacesItselfKeepsItsPidAndTheVm()
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        for (int i = 0; i < 2; i++)
        {
            JsonNode result = JsonNode.Parse(await Vmm.Ok("update", "--vm", "a", "--exec", "--json"))!;
            Assert.That(result["pid"]!.GetValue<int>(), Is.EqualTo(vm.Pid));
            JsonNode status = JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!;
            Assert.That((status["status"]!.ToString(), status["migration"]!["status"]!.ToString()), Is.EqualTo(("running", "completed")));
        }
        await Vmm.Ok("quit", "--vm", "a");
    }

    /// <summary>The update cannot rename the socket, because a rename cannot cross file systems.</summary>
    [Test]
    public async Task TheSocketMayBeOnAnotherFileSystemThanTheVmDirectory()
    {
        const string memory = "/dev/shm";
        if (!Directory.Exists(memory)) Assert.Ignore($"no {memory} on this system");
        DirectoryInfo elsewhere = Directory.CreateDirectory(Path.Combine(memory, Path.GetRandomFileName()));
        string qmp = Path.Combine(elsewhere.FullName, "qmp");
        try
        {
            VmmCommands.Running vm = Vmm.Start("run", "--name", "a", "--memory", "4M", "--qmp", qmp);
            await vm.Line("ready:");
            string result = await Vmm.Ok("update", "--vm", "a", "--json");
            Assert.That(JsonNode.Parse(result)!["pid"]!.GetValue<int>(), Is.Not.EqualTo(vm.Pid));
            Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--qmp", qmp, "--json"))!["status"]!.ToString(), Is.EqualTo("running"));
            Assert.That(Directory.EnumerateFileSystemEntries(elsewhere.FullName), Is.EqualTo(new[] { qmp }));
            await Vmm.Ok("quit", "--vm", "a");
        }
        finally
        {
            elsewhere.Delete(recursive: true);
        }
    }

    [Test]
    public async Task WhereTheSocketCannotMoveTheVmIsFoundWhereItIs()
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        File.Delete(Vmm["vmm/a.qmp"]);
        Directory.CreateDirectory(Vmm["vmm/a.qmp"]);
        JsonNode result = (await vm.Monitor.Execute("__io.github.vmm_update", null, CancellationToken.None))!;
        JsonNode status = JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!;
        Assert.That(status["status"]!.ToString(), Is.EqualTo("running"));
        Assert.That(vm.Errors, Does.Contain($"its QMP socket stays at '{Vmm[$"vmm/{result["pid"]!.GetValue<int>()}.next"]}'"));
        await Vmm.Ok("quit", "--vm", "a");
    }

    [Test]
    public async Task WhereTheEntryCannotBeWrittenTheVmIsFoundByItsSocket()
    {
        VmmCommands.Running vm = Vmm.Start("run", "--name", "a", "--memory", "4M");
        await vm.Line("ready:");
        Directory.CreateDirectory(Vmm["vmm/a.json.new"]);
        // The command waits for the VM's entry, longer than this test takes.
        VmmCommands.Running update = Vmm.Start("update", "--vm", "a");
        await vm.Line($"it is not in the VM directory, its QMP socket is '{Vmm["vmm/a.qmp"]}'");
        Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--qmp", Vmm["vmm/a.qmp"], "--json"))!["status"]!.ToString(), Is.EqualTo("running"));
        await Vmm.Ok("quit", "--qmp", Vmm["vmm/a.qmp"]);
        CliResult result = await update.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain("the new process took the VM over and ended with exit code 0"));
    }

    /// <summary>A QMP client asks for cpr-exec directly, so nobody tries the program first as <c>vmm update</c> does.</summary>
    [Test]
    public async Task AProcessThatCannotReplaceItselfGoesOn()
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        await vm.Monitor.Execute("migrate-set-parameters", new JsonObject { ["mode"] = "cpr-exec", ["cpr-exec-command"] = new JsonArray(Vmm["nothing"], "run") }, CancellationToken.None);
        CliResult result = await Vmm.Run("migrate", "--vm", "a", "--to", $"file:{Vmm["state"]}");
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain("execvp").And.Contain("No such file"));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        Assert.That(await LongestPauseMs(vm, 64 << 20), Is.LessThan(1000));
        await vm.Monitor.Execute("migrate-set-parameters", new JsonObject { ["mode"] = "normal" }, CancellationToken.None);
        await Vmm.Ok("update", "--vm", "a", "--exec");
    }

    [Test]
    public async Task TheClientOfASerialSocketStaysConnectedAndNoKeyIsLost([Values] bool exec)
    {
        KvmGuest.Require();
        string kernel = Vmm["echo"], path = Vmm["console"];
        await File.WriteAllBytesAsync(kernel, SerialTerminalTests.Successor());
        await Vmm.StartVmOf("a", "4M", "--accel", "kvm", "--kernel", kernel, "--device", $"serial,id=com,socket={path}");
        using var client = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = (int)VmmCommands.Deadline.TotalMilliseconds };
        client.Connect(new UnixDomainSocketEndPoint(path));
        using var done = new CancellationTokenSource();
        Task<int> talk = Task.Run(() =>
        {
            byte[] answer = new byte[1];
            int keys = 0;
            for (; !done.IsCancellationRequested || keys < 10; keys++)
            {
                client.Send([(byte)keys]);
                Assert.That((client.Receive(answer), answer[0]), Is.EqualTo((1, (byte)(keys + 1))));
            }
            return keys;
        });
        for (int i = 0; i < 2; i++) await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        await done.CancelAsync();
        TestContext.Out.WriteLine($"{await talk} keys");
        await Vmm.Ok("quit", "--vm", "a");
        Assert.That(client.Receive(new byte[1]), Is.Zero, "the last process ends the connection");
        Assert.That(SpinWait.SpinUntil(() => !File.Exists(path), VmmCommands.Deadline), "the last process removes the socket");
    }

    /// <summary>The old process dies before the new one has received anything, or while the new one waits for the VM.</summary>
    [Test]
    public async Task AProcessWhoseVmCannotComeAnyMoreEnds([Values] bool cpr)
    {
        PeerProcess old = await Vmm.StartVm("a");
        VmmCommands.Running next = Vmm.Start(
            ["run", "--name", "a", "--memory", "64M", "--replaces", $"{old.Pid}", "--incoming", $"unix:{Vmm["main"]}", .. cpr ? (string[])["--incoming", MigrationChannelArgument.Unix("cpr", Vmm["cpr"])] : []]);
        if (cpr) Assert.That(SpinWait.SpinUntil(() => File.Exists(Vmm["cpr"]), VmmCommands.Deadline), "the new process waits for the VM");
        else await next.Line("ready:");
        Posix.Kill(old.Pid, SigKill);
        CliResult result = await next.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain($"process {old.Pid} has ended, and its VM has not arrived"));
    }

    /// <summary>Starts a VM with a served edu function; its guest stands still once an interrupt is lost.</summary>
    private async Task<PeerProcess> StartWithDevice()
    {
        VmmCommands.Running server = Vmm.Start("device", "serve", "--type", "edu", "--socket", Vmm["edu.sock"]);
        await server.Line("serving edu");
        return await Vmm.StartVmOf("a", "1M,id=edu", [.. s_withDevice, "--device", $"vfio-user-pci,id=dev0,socket={Vmm["edu.sock"]}", "--device", "edu-guest"]);
    }

    private static IEnumerable<TestCaseData> Failures()
    {
        const bool start = false, replace = true;
        yield return new TestCaseData(start, null, "cannot start").SetArgDisplayNames("no such program");
        yield return new TestCaseData(start, "exit 3", "exit code 3").SetArgDisplayNames("ends at once");
        yield return new TestCaseData(start, "exec sleep 100", "not ready within 3000 ms").SetArgDisplayNames("never listens");
        // /proc lists the descriptor of the guest's RAM once the process has received it. The process then blocks on a pipe that nobody reads.
        yield return new TestCaseData(
            start, "mkfifo \"$0.pipe\"; \"$VMM\" \"$@\" --device serial,id=late,output=\"$0.pipe\" & new=$!; until ls -l /proc/$new/fd 2>&1 | grep -q memfd:vmm-ram-mark; do kill -0 $new || exit 9; sleep 0.02; done; kill -9 $new; wait $new; rm \"$0.pipe\"; exit 7", "exit code 7")
            .SetArgDisplayNames("killed after it has the descriptors");
        yield return new TestCaseData(start, "for a; do shift; [ \"$a\" = scratch ] && a=ticker,block=ticks,id=other; set -- \"$@\" \"$a\"; done; exec \"$VMM\" \"$@\"", "scratch")
            .SetArgDisplayNames("does not know a section");
        yield return new TestCaseData(start, "for a; do shift; [ \"$a\" = 64M,id=ram ] && a=32M,id=ram; set -- \"$@\" \"$a\"; done; exec \"$VMM\" \"$@\"", "exit code 2")
            .SetArgDisplayNames("has other RAM");
        // After an exec there is no old process to return to, so the update tries the program first.
        yield return new TestCaseData(replace, null, "cannot start").SetArgDisplayNames("exec, no such program");
        yield return new TestCaseData(replace, "echo broken >&2; exit 3", "exit code 3: broken").SetArgDisplayNames("exec, ends at once");
        yield return new TestCaseData(replace, "exec sleep 100", "not ready within 3000 ms").SetArgDisplayNames("exec, never ends");
        yield return new TestCaseData(replace, "for a; do shift; [ \"$a\" = --memory ] && a=--ram; set -- \"$@\" \"$a\"; done; exec \"$VMM\" \"$@\"", "exit code 2: ")
            .SetArgDisplayNames("exec, does not know an option");
    }

    [TestCaseSource(nameof(Failures))]
    public async Task WhateverHappensToTheNewProcessTheVmGoesOnInTheOldOne(bool exec, string? script, string reason)
    {
        PeerProcess vm = await StartWithDevice();
        // An earlier process with the same pid may have left this file.
        await File.WriteAllTextAsync(Vmm[$"vmm/{vm.Pid}.cpr"], "");
        string?[] before = [.. exec ? Vmm.Registered : Vmm.Registered.Where(n => n != $"{vm.Pid}.cpr")];
        CliResult result = await UpdateTo(script, exec);
        Assert.That(result.Code, Is.Not.EqualTo(ExitCode.Ok));
        Assert.That(Vmm.Registered, Is.EqualTo(before), "the update removed what it had created");
        Assert.That(result.Error, Does.Contain(reason));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        Assert.That(await LongestPauseMs(vm), Is.LessThan(1000), "by the guest's own clock");
        long steps = await Word(vm, 0, 0);
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await Word(vm, 0, 0) < steps + 10) Assert.That(limit.IsCancellationRequested, Is.False, "an interrupt was lost");
        Assert.That(await Word(vm, 0, 8), Is.Zero, "pages came back wrong");
        JsonNode verified = (await vm.Monitor.Execute("__io.github.vmm_workload-verify", null, CancellationToken.None))!;
        Assert.That(verified["bad-pages"]!.GetValue<long>() + verified["violations"]!.GetValue<long>(), Is.Zero);
        // The next update, to a program that works, succeeds.
        await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        await Vmm.Ok("quit", "--vm", "a");
    }

    [TestCaseSource(nameof(Failures))]
    public async Task WhateverHappensToTheNewProcessAGuestWithACpuGoesOnInTheOldOne(bool exec, string? script, string reason)
    {
        KvmGuest.Require();
        await Vmm.Start("device", "serve", "--type", "edu", "--socket", Vmm["edu.sock"]).Line("serving edu");
        UpdatedGuest guest = UpdatedGuest.Kvm(64, Vmm["edu.sock"]);
        PeerProcess vm = await Vmm.StartVmOf("a", guest.FirstBlock, [.. guest.Arguments, "--memory", "1M,id=ticks", .. s_mark, "--device", "scratch"]);
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        UpdatedGuest.Seen before;
        while ((before = await guest.Look(vm.Monitor, Vmm["words"])).Interrupts < 10) Assert.That(limit.IsCancellationRequested, Is.False, "the device stands still");
        CliResult result = await UpdateTo(script, exec);
        Assert.That((result.Code, result.Error), Is.Not.EqualTo((ExitCode.Ok, result.Error)));
        Assert.That(result.Error, Does.Contain(reason));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        UpdatedGuest.Seen after = await guest.Look(vm.Monitor, Vmm["words"]);
        using var again = new CancellationTokenSource(VmmCommands.Deadline);
        while ((await guest.Look(vm.Monitor, Vmm["words"])).Interrupts < after.Interrupts + 10) Assert.That(again.IsCancellationRequested, Is.False, "an interrupt was lost");
        await guest.Verify(vm.Monitor, Vmm["words"], again.Token);
        Assert.That((await guest.Look(vm.Monitor, Vmm["words"])).StopGapMs, Is.LessThan(1000), "by the guest's own clock");
        await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        await Vmm.Ok("quit", "--vm", "a");
    }

    [Test]
    public async Task OneUpdateAtATime([Values] bool exec)
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        // The script reports that it has begun, and waits until the test opens the gate.
        Task<CliResult> first = UpdateTo($"mkfifo {Vmm["gate"]}; echo > {Vmm["begun"]}; read < {Vmm["gate"]}; exit 3", exec: false);
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (!File.Exists(Vmm["begun"])) Assert.That(limit.IsCancellationRequested || first.IsCompleted, Is.False, "the new process was not started");
        CliResult second = await Vmm.Run(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        Assert.That((second.Code, second.Error), Is.EqualTo((ExitCode.Failed, second.Error)));
        Assert.That(second.Error, Does.Contain("an update of this VM is under way"));
        await File.WriteAllTextAsync(Vmm["gate"], "\n");
        Assert.That((await first).Error, Does.Contain("exit code 3"));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        await Vmm.Ok("update", "--vm", "a");
    }

    [Test]
    public async Task AMigrationUnderWayRefusesAnUpdateBeforeAnythingIsStarted()
    {
        PeerProcess vm = await Vmm.StartVm("a", s_guest);
        await vm.Monitor.Execute("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 4096 }, CancellationToken.None);
        await vm.Monitor.Execute("migrate", new JsonObject { ["uri"] = $"file:{Vmm["state"]}" }, CancellationToken.None);
        CliResult result = await UpdateTo($"echo > {Vmm["begun"]}; exit 3", exec: false);
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain("a migration of this VM is under way"));
        Assert.That(Vmm["begun"], Does.Not.Exist);
        await vm.Monitor.Execute("migrate_cancel", null, CancellationToken.None);
    }

    /// <summary>Updates the VM to a program that runs this script, or to a missing program.</summary>
    private async Task<CliResult> UpdateTo(string? script, bool exec)
    {
        string binary = Vmm["next"];
        if (script is not null)
        {
            (string file, string[] prefix) = PeerProcess.Self();
            await File.WriteAllTextAsync(binary, $"#!/bin/bash\nVMM='{file}'\n{string.Concat(prefix.Select(static p => $"set -- '{p}' \"$@\"\n"))}{script}\n");
            File.SetUnixFileMode(binary, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        }
        return await Vmm.Run(["update", "--vm", "a", "--to-binary", binary, "--timeout", script?.Contains("exec sleep", StringComparison.Ordinal) == true ? "3" : "30", .. exec ? (string[])["--exec"] : []]);
    }

    [TestCase("--incoming", "tcp:a:1", "-S", "--incoming={}", "--replaces", "7", "--paused")]
    [TestCase("--replaces:7", "--incoming:{}")]
    [TestCase("--paused=true")]
    [TestCase("--paused:false")]
    [TestCase("-S=true")]
    [TestCase("--paused", "true")]
    [TestCase("-S", "False")]
    public void WhatConcernedTheStartOfAProcessIsNotHandedOn(params string[] start) => Assert.That(
        CommandLineUpdate.Own(["run", "--name", "true", .. start, "--memory", "1M"]), Is.EqualTo(new[] { "run", "--name", "true", "--memory", "1M" }));

    [TestCase("--paused=true")]
    [TestCase("--paused", "true")]
    public async Task AVmThatWasStartedPausedAndRunsGoesOnRunning(params string[] paused)
    {
        await Vmm.StartVm("a", paused);
        await Vmm.Ok("cont", "--vm", "a");
        await Vmm.Ok("update", "--vm", "a");
        Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!["status"]!.ToString(), Is.EqualTo("running"));
    }

    /// <summary>Reads the longest pause from the ticker's block, which follows the other blocks at the next multiple of 2 MiB.</summary>
    private async Task<double> LongestPauseMs(PeerProcess vm, int ticksAt = 66 << 20) => await Word(vm, ticksAt, 8) / 1e6;

    private async Task<long> Word(PeerProcess vm, int address, int offset)
    {
        string file = Vmm["words"];
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = address + offset, ["size"] = 8, ["filename"] = file }, CancellationToken.None);
        return BitConverter.ToInt64(await File.ReadAllBytesAsync(file));
    }
}
