using System.Text.Json.Nodes;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>What <c>vmm update</c> says is what has happened, and nothing of a failed update stays.</summary>
[TestFixture]
internal sealed class UpdateTruthTests : EndToEnd
{
    /// <summary>Ctrl-C at another moment: when the new program is tried or started, when it listens for descriptors, when the process is about to replace itself.</summary>
    [TestCase(false, ".report")]
    [TestCase(false, ".cpr")]
    [TestCase(true, ".report")]
    [TestCase(true, ".state")]
    public async Task AnInterruptedUpdateSaysWhetherTheVmMoved(bool exec, string moment)
    {
        PeerProcess vm = await Busy("a");
        JsonNode before = Entry();
        VmmCommands.Running update = Vmm.Start(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (!File.Exists(Vmm[$"vmm/{vm.Pid}{moment}"]) && !limit.IsCancellationRequested && Entry().ToJsonString() == before.ToJsonString()) await Task.Yield();
        update.Signal(SigInt);
        CliResult result = await update.Finish();
        JsonNode after = Entry();
        bool moved = after.ToJsonString() != before.ToJsonString();
        Assert.That(result.Code, Is.EqualTo(moved ? ExitCode.Ok : ExitCode.Cancelled), result.Error);
        Assert.That(moved ? result.Out : result.Error, Does.Contain(moved ? "updated: the VM runs in process" : "cancelled"));
        Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!["status"]!.ToString(), Is.EqualTo("running"));
        TestContext.Out.WriteLine($"moved: {moved}");
    }

    [Test]
    public async Task AnUpdateThatWaitsIsCancelledAndItsProcessEnds([Values] bool exec)
    {
        await Busy("a");
        VmmCommands.Running update = Vmm.Start(["update", "--vm", "a", "--to-binary", Program($"echo $$ > {Vmm["begun.new"]}; mv {Vmm["begun.new"]} {Vmm["begun"]}; exec sleep 1000"), .. exec ? (string[])["--exec"] : []]);
        LeakCheck.WaitFor(() => File.Exists(Vmm["begun"]), "the new program did not start");
        update.Signal(SigInt);
        CliResult result = await update.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Cancelled, result.Error)));
        Assert.That(result.Error, Does.Contain("update cancelled; the VM goes on in its old process"));
        int pid = int.Parse(await File.ReadAllTextAsync(Vmm["begun"]));
        LeakCheck.WaitFor(() => VmEntry.ReadStartTicks(pid) is null, "the new program still runs");
        Assert.That(Vmm.Registered, Is.EqualTo((string[])["a.json", "a.qmp"]));
        await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
    }

    [Test]
    public async Task WhatTheNewProgramHasStartedEndsWithIt([Values] bool exec)
    {
        await Busy("a");
        string program = Program($"sleep 1000 & echo $! > {Vmm["child.new"]}; mv {Vmm["child.new"]} {Vmm["child"]}; wait");
        VmmCommands.Running update = Vmm.Start(["update", "--vm", "a", "--to-binary", program, .. exec ? (string[])["--exec"] : []]);
        LeakCheck.WaitFor(() => File.Exists(Vmm["child"]), "the new program did not start");
        update.Signal(SigInt);
        CliResult result = await update.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Cancelled, result.Error)));
        int pid = int.Parse(await File.ReadAllTextAsync(Vmm["child"]));
        LeakCheck.WaitFor(() => VmEntry.ReadStartTicks(pid) is null, "the child still runs");
    }

    [Test]
    public async Task AVmThatHasMigratedAwayStartsNoProcess([Values] bool exec, [Values] bool byQmp)
    {
        PeerProcess vm = await Busy("a");
        await Vmm.Ok("migrate", "--vm", "a", "--to", $"file:{Vmm["a.mig"]}");
        string program = Program($"echo > {Vmm["begun"]}; exit 3");
        for (int i = 0; i < 3; i++)
        {
            if (byQmp)
            {
                Assert.That(async () => await vm.Monitor.Execute("__io.github.vmm_update", new JsonObject { ["binary"] = program, ["exec"] = exec }, CancellationToken.None),
                    Throws.TypeOf<MonitorException>().With.Message.Contains("migrated away"));
                continue;
            }
            CliResult result = await Vmm.Run(["update", "--vm", "a", "--to-binary", program, .. exec ? (string[])["--exec"] : []]);
            Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Refused, result.Error)));
            Assert.That(result.Error, Does.Contain("migrated away"));
        }
        Assert.That(Vmm["begun"], Does.Not.Exist);
        Assert.That(Vmm.Registered, Is.EqualTo((string[])["a.json", "a.qmp"]));
    }

    private static IEnumerable<TestCaseData> NoVmm()
    {
        yield return new TestCaseData("/bin/true", null).SetArgDisplayNames("true");
        yield return new TestCaseData(null, "exit 0").SetArgDisplayNames("a script that ends well");
        yield return new TestCaseData(null, "exec \"$VMM\" --help").SetArgDisplayNames("a vmm that does something else");
        yield return new TestCaseData(null, "unset VMM_UPDATE; exec \"$VMM\" \"$@\"").SetArgDisplayNames("a vmm that does not know of the trial");
        yield return new TestCaseData(null, "VMM_UPDATE=$(echo \"$VMM_UPDATE\" | sed s/^trial=.*/trial=0/); export VMM_UPDATE; exec \"$VMM\" \"$@\"").SetArgDisplayNames("another trial's word");
    }

    /// <summary>After an exec there is no way back, so the VM must not depend on a program that only ends with code 0.</summary>
    [TestCaseSource(nameof(NoVmm))]
    public async Task AProgramThatDoesNotProveThatItCanLoadTheVmIsNotExecuted(string? binary, string? script)
    {
        PeerProcess vm = await Busy("a");
        CliResult result = await Vmm.Run("update", "--vm", "a", "--exec", "--to-binary", binary ?? Program(script!));
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain("did not prove that it can take the VM"));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        Assert.That(Vmm.Registered, Is.EqualTo((string[])["a.json", "a.qmp"]));
        await Vmm.Ok("update", "--vm", "a", "--exec");
        Assert.That(Vmm.Registered, Is.EqualTo((string[])["a.json", "a.qmp"]));
    }

    [TestCase("serial,id=scratch", "the VM has a section 'scratch', and no device here has one")]
    [TestCase("nosuch", "device type 'nosuch' is not known here")]
    public async Task AProgramThatDoesNotKnowADeviceOfTheVmIsNotExecuted(string instead, string reason)
    {
        PeerProcess vm = await Vmm.StartVm("a", "--device", "scratch");
        string program = Program($"for a; do shift; [ \"$a\" = scratch ] && a={instead}; set -- \"$@\" \"$a\"; done; exec \"$VMM\" \"$@\"");
        CliResult result = await Vmm.Run("update", "--vm", "a", "--exec", "--to-binary", program);
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain(reason));
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        await Vmm.Ok("update", "--vm", "a", "--exec");
    }

    [Test]
    public async Task WhatAKilledUpdateLeftIsRemovedByTheNextCommand()
    {
        const int dead = int.MaxValue - 1;
        await Vmm.StartVm("a");
        await File.WriteAllTextAsync(Vmm[$"vmm/{dead}.state"], "x");
        await File.WriteAllTextAsync(Vmm["vmm/1.state"], "x");
        await Vmm.Ok("list");
        Assert.That(Vmm.Registered, Is.EqualTo((string[])["1.state", "a.json", "a.qmp"]), "only what belongs to no process goes");
    }

    private JsonNode Entry() => JsonNode.Parse(File.ReadAllText(Vmm["vmm/a.json"]))!;

    /// <summary>Makes a program that runs a script; <c>$VMM</c> is the real one.</summary>
    private string Program(string script)
    {
        (string file, string[] prefix) = PeerProcess.Self();
        string path = Vmm["next"];
        File.WriteAllText(path, $"#!/bin/bash\nVMM='{file}'\n{string.Concat(prefix.Select(static p => $"set -- '{p}' \"$@\"\n"))}{script}\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }
}
