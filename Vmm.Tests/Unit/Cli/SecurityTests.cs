using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>What docs/security.md promises of a running VM: its privileges, and who can reach its files and sockets.</summary>
[TestFixture]
internal sealed class SecurityTests : EndToEnd
{
    private const UnixFileMode OwnerOnly = UnixFileMode.UserRead | UnixFileMode.UserWrite, OwnerOnlyFolder = OwnerOnly | UnixFileMode.UserExecute;

    /// <summary>DAC_OVERRIDE, NET_BIND_SERVICE, NET_ADMIN, IPC_LOCK and SYS_NICE.</summary>
    private const ulong Kept = 1ul << 1 | 1ul << 10 | 1ul << 12 | 1ul << 14 | 1ul << 23;

    [Test]
    public async Task EveryThreadOfAVmAndWhatItExecutesHasNoPrivilegesToGain()
    {
        PeerProcess vm = await Vmm.StartVm("a", "--workload", "pattern,rate=1M");
        ExpectConfined(vm.Pid);
        await Vmm.Ok("update", "--vm", "a", "--exec");
        ExpectConfined(vm.Pid);
        JsonNode moved = JsonNode.Parse(await Vmm.Ok("update", "--vm", "a", "--json"))!;
        int pid = moved["pid"]!.GetValue<int>();
        Assert.That(pid, Is.Not.EqualTo(vm.Pid));
        ExpectConfined(pid);
        await Vmm.Ok("migrate", "--vm", "a", "--to", $"exec:cat /proc/self/status > {Vmm["child"]}; cat > /dev/null");
        ExpectConfined(await File.ReadAllLinesAsync(Vmm["child"]), "the command of exec:");
        await Vmm.Ok("quit", "--vm", "a");
    }

    [Test]
    public async Task ADeviceServerHasNoPrivilegesToGainEither()
    {
        VmmCommands.Running server = Vmm.Start("device", "serve", "--type", "edu", "--socket", Vmm["edu"]);
        await server.Line("serving edu");
        ExpectConfined(server.Pid);
        Assert.That(File.GetUnixFileMode(Vmm["edu"]), Is.EqualTo(OwnerOnly));
    }

    [Test]
    public async Task NobodyElseReachesTheFilesAndSocketsOfAVm()
    {
        PeerProcess vm = await Vmm.StartVm("a", "--device", $"serial,id=c,socket={Vmm["consoles/one"]}", "--device", $"serial,id=o,output={Vmm["out"]}");
        await Vmm.StartVm("b", "--incoming", $"unix:{Vmm["incoming/socket"]}");
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = 0, ["size"] = 4096, ["filename"] = Vmm["memory"] }, CancellationToken.None);
        await Vmm.Ok("savevm", "s", "--vm", "a");
        foreach (string file in new[] { "vmm/a.qmp", "vmm/a.json", "vmm/.lock", "consoles/one", "out", "incoming/socket", "memory", "snapshots-a/s/vmstate", "snapshots-a/s/manifest.json" })
            Assert.That(File.GetUnixFileMode(Vmm[file]), Is.EqualTo(OwnerOnly), file);
        foreach (string folder in new[] { "vmm", "consoles", "incoming", "snapshots-a", "snapshots-a/s" })
            Assert.That(File.GetUnixFileMode(Vmm[folder]), Is.EqualTo(OwnerOnlyFolder), folder);
        await Vmm.Ok("migrate", "--vm", "a", "--to", $"file:{Vmm["a.mig"]}");
        Assert.That(File.GetUnixFileMode(Vmm["a.mig"]), Is.EqualTo(OwnerOnly));
    }

    [Test]
    public async Task ADirectoryThatCannotBeWrittenIsNamedWithItsReason()
    {
        if (PrivateDirectory.CurrentUserId != 0 || Shell.Run("unshare", "-m", "true").Status != 0) Assert.Ignore("no mount namespace here");
        string store = Vmm["snapshots-a"];
        await Vmm.StartVm("a");
        await Vmm.Ok("savevm", "s", "--vm", "a");
        await Vmm.Ok("quit", "--vm", "a");
        VmmCommands.Running run = Vmm.StartThrough(["unshare", "-m", "sh"], $"mount --bind {store} {store} && mount -o remount,bind,ro {store} && exec \"$@\"",
            "run", "--name", "b", "--memory", "64M", "--snapshot-dir", store);
        await run.Line("ready:");
        CliResult deleted = await Vmm.Run("delvm", "s", "--vm", "b"), saved = await Vmm.Run("savevm", "t", "--vm", "b");
        Assert.That((deleted.Code, saved.Code), Is.EqualTo((ExitCode.Failed, ExitCode.Failed)), deleted.Error + saved.Error);
        Assert.That(deleted.Error, Does.Contain($"cannot delete snapshot 's' in '{store}': Read-only file system").And.Not.Contain("internal error"));
        Assert.That(saved.Error, Does.Contain($"cannot write to snapshot directory '{store}'").And.Not.Contain("internal error"));
        Assert.That(await Vmm.Ok("snapshots", "--vm", "b"), Does.Contain("s "));
        await Vmm.Ok("loadvm", "s", "--vm", "b");
        await Vmm.Ok("quit", "--vm", "b");
    }

    [TestCase(107)]
    [TestCase(108)]
    public async Task ASocketPathIsRefusedAtTheStartOrWorksForUpdatesToo(int bytes)
    {
        string qmp = Vmm[new string('d', bytes - Vmm[""].Length - "//q".Length)] + "/q";
        Assert.That(qmp, Has.Length.EqualTo(bytes));
        VmmCommands.Running run = Vmm.Start("run", "--name", "a", "--memory", "4M", "--qmp", qmp);
        if (bytes > 107)
        {
            CliResult result = await run.Finish();
            Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Usage, result.Error)));
            Assert.That(result.Error, Does.Contain("107 bytes"));
            return;
        }
        await run.Line("ready:");
        await ExpectUpdates(static (vmm, arguments) => vmm.Ok(arguments), run);
    }

    [Test]
    public async Task AVmDirectoryWithALongPathWorksForUpdatesToo()
    {
        string runtime = Vmm[new string('r', 107 - "//vmm/a.qmp".Length - Vmm[""].Length)];
        Directory.CreateDirectory(runtime, OwnerOnlyFolder);
        string script = $"export XDG_RUNTIME_DIR={runtime}; exec \"$@\"";
        VmmCommands.Running run = Vmm.StartThrough(["sh"], script, "run", "--name", "a", "--memory", "4M");
        await run.Line($"qmp {runtime}/vmm/a.qmp");
        await ExpectUpdates(async (vmm, arguments) =>
        {
            CliResult result = await vmm.StartThrough(["sh"], script, arguments).Finish();
            Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), result.Error);
            Assert.That(result.Error, Does.Not.Contain("107"));
            return result.Out;
        }, run);
    }

    private async Task ExpectUpdates(Func<VmmCommands, string[], Task<string>> ok, VmmCommands.Running run)
    {
        await ok(Vmm, ["update", "--vm", "a", "--exec"]);
        JsonNode moved = JsonNode.Parse(await ok(Vmm, ["update", "--vm", "a", "--json"]))!;
        Assert.That(moved["pid"]!.GetValue<int>(), Is.Not.EqualTo(run.Pid));
        Assert.That(JsonNode.Parse(await ok(Vmm, ["status", "--vm", "a", "--json"]))!["status"]!.ToString(), Is.EqualTo("running"));
        await ok(Vmm, ["quit", "--vm", "a"]);
    }

    private static void ExpectConfined(int pid)
    {
        foreach (string thread in Directory.GetDirectories($"/proc/{pid}/task"))
        {
            string[] lines;
            try
            {
                lines = File.ReadAllLines(Path.Combine(thread, "status"));
            }
            catch (IOException)
            {
                continue; // The thread ended after the listing.
            }
            ExpectConfined(lines, $"{lines[0]} of process {pid}");
        }
    }

    private static void ExpectConfined(string[] status, string whose)
    {
        Assert.That(status, Does.Contain("NoNewPrivs:\t1"), whose);
        foreach (string set in new[] { "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb" })
        {
            // Who has no capabilities cannot shrink the bounding set, and with no_new_privs it gives nothing.
            if (set == "CapBnd" && PrivateDirectory.CurrentUserId != 0) continue;
            string line = status.Single(l => l.StartsWith(set + ":\t", StringComparison.Ordinal));
            Assert.That(ulong.Parse(line[(set.Length + 2)..], NumberStyles.HexNumber, CultureInfo.InvariantCulture) & ~Kept, Is.Zero, $"{whose}: {line}");
        }
    }
}
