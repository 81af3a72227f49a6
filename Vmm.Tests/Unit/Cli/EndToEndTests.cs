using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Demo;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>The program as its users run it: real processes, real sockets.</summary>
[Category("cli")]
[CancelAfter(120_000)]
internal sealed class EndToEndTests
{
    private const int SigInt = 2, SigKill = 9, SigTerm = 15;
    private VmmCommands _vmm = null!;

    [SetUp]
    public void SetUp() => _vmm = new VmmCommands();

    [TearDown]
    public async Task TearDown() => await _vmm.DisposeAsync();

    [Test]
    public async Task A_VM_is_listed_stopped_continued_and_quit_and_leaves_nothing()
    {
        PeerProcess vm = await _vmm.StartVm("alpha");
        Assert.That(await _vmm.Ok("status"), Does.Match("name +alpha\nstate +running\n"));
        Assert.That(await _vmm.Ok("list"), Does.Contain("alpha").And.Contain("running").And.Contain("64 MiB"));
        await _vmm.Ok("stop", "--vm", "alpha");
        Assert.That(await _vmm.State(vm), Is.EqualTo("paused"));
        await _vmm.Ok("cont", "--vm", $"{vm.Pid}");
        Assert.That(await _vmm.State(vm), Is.EqualTo("running"));
        await _vmm.Ok("quit");
        Assert.Multiple(async () =>
        {
            Assert.That(await Exit(vm), Is.Zero);
            Assert.That(_vmm.Registered, Is.Empty);
            Assert.That((await _vmm.Run("status")).Code, Is.EqualTo(ExitCode.Unreachable));
        });
    }

    [TestCase(SigTerm)]
    [TestCase(SigInt)]
    public async Task A_signal_ends_a_VM_cleanly(int signal)
    {
        PeerProcess vm = await _vmm.StartVm("alpha", "--paused");
        Assert.That(await _vmm.State(vm), Is.EqualTo("prelaunch"));
        LibC.kill(vm.Pid, signal);
        Assert.That(await Exit(vm), Is.Zero);
        Assert.That(_vmm.Registered, Is.Empty);
    }

    [Test]
    public async Task The_socket_of_a_killed_VM_is_recognised_and_removed()
    {
        PeerProcess vm = await _vmm.StartVm("alpha");
        LibC.kill(vm.Pid, SigKill);
        await Exit(vm);
        Assert.That(_vmm.Registered, Is.EqualTo(new[] { "alpha.json", "alpha.qmp" }));
        Assert.That((await _vmm.Run("list")).Error, Does.Contain("no VM runs"));
        Assert.That(_vmm.Registered, Is.Empty);
        await _vmm.StartVm("alpha");
    }

    [Test]
    public async Task Several_VMs_need_a_choice_and_a_name_is_taken_once()
    {
        await _vmm.StartVm("alpha");
        await _vmm.StartVm("beta");
        CliResult which = await _vmm.Run("status"), twice = await _vmm.Run("run", "--name", "alpha");
        Assert.Multiple(() =>
        {
            Assert.That((which.Code, which.Error.Contains("alpha, beta")), Is.EqualTo((ExitCode.Usage, true)));
            Assert.That((twice.Code, twice.Error.Contains("runs already")), Is.EqualTo((ExitCode.Refused, true)));
        });
    }

    [TestCase("tcp:127.0.0.1:0")]
    [TestCase("unix:SOCKET")]
    public async Task A_running_VM_moves_to_another_process(string uri)
    {
        uri = uri.Replace("SOCKET", _vmm["in.sock"], StringComparison.Ordinal);
        PeerProcess source = await _vmm.StartVm("alpha"), destination = await _vmm.StartVm("beta", "--incoming", uri);
        JsonNode result = JsonNode.Parse(await _vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--json"))!;
        Assert.That(result["status"]!.ToString(), Is.EqualTo("completed"));
        Assert.That((await _vmm.State(source), await _vmm.State(destination)), Is.EqualTo(("postmigrate", "running")));
        Assert.That(File.Exists(_vmm["in.sock"]), Is.False);
        CliResult again = await _vmm.Run("migrate", "--vm", "alpha", "--to", destination.IncomingUri);
        Assert.That((again.Code, again.Error.Contains("migrated away")), Is.EqualTo((ExitCode.Refused, true)));
    }

    [Test]
    public async Task A_VM_moves_through_a_file_and_goes_on_from_it()
    {
        PeerProcess source = await _vmm.StartVm("alpha");
        string summary = await _vmm.Ok("migrate", "--to", $"file:{_vmm["vm.mig"]}");
        Assert.That(summary, Does.Contain("completed"));
        Assert.That(await _vmm.State(source), Is.EqualTo("postmigrate"));
        PeerProcess destination = await _vmm.StartVm("beta", "--incoming", $"file:{_vmm["vm.mig"]}");
        await WaitForState(destination, "running");
    }

    [Test]
    public async Task A_bad_incoming_file_ends_the_VM_with_the_reason()
    {
        File.WriteAllText(_vmm["bad.mig"], "this is no migration stream");
        CliResult result = await _vmm.Run("run", "--memory", "1M", "--incoming", $"file:{_vmm["bad.mig"]}");
        Assert.That((result.Code, _vmm.Registered.Any()), Is.EqualTo((ExitCode.Failed, false)));
        Assert.That(result.Error, Does.Contain("incoming migration failed"));
    }

    [Test]
    public async Task A_peer_that_is_not_there_fails_the_migration_and_the_VM_goes_on()
    {
        PeerProcess source = await _vmm.StartVm("alpha");
        CliResult result = await _vmm.Run("migrate", "--to", $"unix:{_vmm["nobody"]}");
        Assert.That((result.Code, await _vmm.State(source)), Is.EqualTo((ExitCode.Unreachable, "running")));
        Assert.That(result.Error, Does.StartWith("vmm: migration failed: ").Or.Contains("\nvmm: migration failed: ").And.Contain("nobody"));
    }

    [Test]
    public async Task Garbage_leaves_the_destination_able_to_take_another_attempt()
    {
        PeerProcess source = await _vmm.StartVm("alpha"), destination = await _vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0");
        using (var garbage = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp))
        {
            await garbage.ConnectAsync(IPEndPoint.Parse(destination.IncomingUri["tcp:".Length..]));
            await garbage.SendAsync("GET / HTTP/1.0\r\n\r\n"u8.ToArray());
            garbage.Shutdown(SocketShutdown.Send);
            await garbage.ReceiveAsync(new byte[16]);
        }
        await _vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri);
        Assert.That((await _vmm.State(source), await _vmm.State(destination)), Is.EqualTo(("postmigrate", "running")));
        Assert.That(destination.Errors, Does.Contain("incoming migration failed").And.Contain("waiting for another"));
    }

    [TestCase("interrupt", ExitCode.Cancelled)]
    [TestCase("terminate", ExitCode.Cancelled)]
    [TestCase("timeout", ExitCode.Timeout)]
    [TestCase("cancel", ExitCode.Cancelled)]
    public async Task A_migration_that_is_ended_early_leaves_the_source_running_and_the_destination_ready(string how, ExitCode expected)
    {
        (PeerProcess source, PeerProcess destination) = (await BusyVm("alpha"), await _vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0"));
        string[] slow = ["migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=1M"];
        using VmmCommands.Running command = _vmm.Start(how == "timeout" ? [.. slow, "--timeout", "0.5"] : slow);
        await command.Line("active: round 1");
        if (how == "interrupt") command.Signal(SigInt);
        if (how == "terminate") command.Signal(SigTerm);
        if (how == "cancel") await _vmm.Ok("cancel", "--vm", "alpha");
        CliResult result = await command.Finish();
        Assert.That(result.Code, Is.EqualTo(expected), result.Error);
        Assert.That((await _vmm.State(source), await _vmm.State(destination)), Is.EqualTo(("running", "inmigrate")));
        await _vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=0");
        Assert.That((await _vmm.State(source), await _vmm.State(destination)), Is.EqualTo(("postmigrate", "running")));
    }

    [Test]
    public async Task A_detached_migration_can_be_watched_refuses_another_and_is_cancelled()
    {
        (PeerProcess source, PeerProcess destination) = (await BusyVm("alpha"), await _vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0"));
        string[] migrate = ["migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=1M"];
        await _vmm.Ok([.. migrate, "--check"]);
        Assert.That(JsonNode.Parse(await _vmm.Ok("status", "--vm", "alpha", "--json"))!["migration"]!["status"]?.ToString(), Is.Null.Or.EqualTo("none"));
        await _vmm.Ok([.. migrate, "--detach"]);
        CliResult second = await _vmm.Run(migrate), check = await _vmm.Run([.. migrate, "--check"]);
        Assert.That((second.Code, check.Code), Is.EqualTo((ExitCode.Refused, ExitCode.Refused)), second.Error + check.Error);
        await _vmm.Ok("cancel", "--vm", "alpha");
        Assert.That(await _vmm.Ok("status", "--vm", "alpha"), Does.Match("migration +cancelled"));
        Assert.That(await _vmm.State(source), Is.EqualTo("running"));
    }

    [Test]
    public async Task A_capability_that_is_not_implemented_is_refused_by_name()
    {
        await _vmm.StartVm("alpha");
        CliResult result = await _vmm.Run("migrate", "--to", "tcp:127.0.0.1:1", "--capability", "xbzrle");
        Assert.That((result.Code, result.Error.Contains("xbzrle")), Is.EqualTo((ExitCode.Refused, true)));
    }

    [Test]
    public async Task Snapshots_are_saved_listed_loaded_and_deleted()
    {
        PeerProcess vm = await _vmm.StartVm("alpha");
        Assert.That((await _vmm.Run("snapshots")).Error, Does.Contain("no snapshots"));
        await _vmm.Ok("savevm", "one");
        Assert.That(await _vmm.Ok("snapshots"), Does.Contain("one"));
        Assert.That(((JsonArray)JsonNode.Parse(await _vmm.Ok("snapshots", "--json"))!)[0]!["name"]!.ToString(), Is.EqualTo("one"));
        CliResult twice = await _vmm.Run("savevm", "one"), missing = await _vmm.Run("loadvm", "two"), slash = await _vmm.Run("savevm", "a/b");
        Assert.Multiple(() =>
        {
            Assert.That((twice.Code, twice.Error.Contains("'one'")), Is.EqualTo((ExitCode.Failed, true)));
            Assert.That((missing.Code, missing.Error.Contains("'two'")), Is.EqualTo((ExitCode.Failed, true)));
            Assert.That((slash.Code is ExitCode.Failed or ExitCode.Usage, slash.Error.Contains("a/b")), Is.EqualTo((true, true)));
        });
        await _vmm.Ok("loadvm", "one");
        Assert.That(await _vmm.State(vm), Is.EqualTo("running"));
        await _vmm.Ok("delvm", "one");
        Assert.That((await _vmm.Run("delvm", "one")).Code, Is.EqualTo(ExitCode.Failed));
        Assert.That((await _vmm.Run("snapshots")).Error, Does.Contain("no snapshots"));
    }

    private Task<PeerProcess> BusyVm(string name) => _vmm.StartVm(name, "--workload", "pattern,rate=10M,prefill=on");

    private async Task WaitForState(PeerProcess vm, string state)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await _vmm.State(vm) != state) limit.Token.ThrowIfCancellationRequested();
    }

    private static async Task<int> Exit(PeerProcess vm)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        return await vm.WaitForExit(limit.Token);
    }
}
