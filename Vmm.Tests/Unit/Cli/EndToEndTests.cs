using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>The program as its users run it: real processes, real sockets.</summary>
internal sealed class EndToEndTests : EndToEnd
{
    [Test]
    public async Task A_VM_is_listed_stopped_continued_and_quit_and_leaves_nothing()
    {
        PeerProcess vm = await Vmm.StartVm("alpha");
        Assert.That(await Vmm.Ok("status"), Does.Match("name +alpha\nstate +running\n"));
        Assert.That(await Vmm.Ok("list"), Does.Contain("alpha").And.Contain("running").And.Contain("64 MiB"));
        await Vmm.Ok("stop", "--vm", "alpha");
        Assert.That(await Vmm.State(vm), Is.EqualTo("paused"));
        await Vmm.Ok("cont", "--vm", $"{vm.Pid}");
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        await Vmm.Ok("quit");
        Assert.Multiple(async () =>
        {
            Assert.That(await Exit(vm), Is.Zero);
            Assert.That(Vmm.Registered, Is.Empty);
            Assert.That((await Vmm.Run("status")).Code, Is.EqualTo(ExitCode.Unreachable));
        });
    }

    [TestCase(SigTerm)]
    [TestCase(SigInt)]
    public async Task A_signal_ends_a_VM_cleanly(int signal)
    {
        PeerProcess vm = await Vmm.StartVm("alpha", "--paused");
        Assert.That(await Vmm.State(vm), Is.EqualTo("prelaunch"));
        Posix.Kill(vm.Pid, signal);
        Assert.That(await Exit(vm), Is.Zero);
        Assert.That(Vmm.Registered, Is.Empty);
    }

    [Test]
    public async Task The_socket_of_a_killed_VM_is_recognised_and_removed()
    {
        PeerProcess vm = await Vmm.StartVm("alpha");
        Posix.Kill(vm.Pid, SigKill);
        await Exit(vm);
        Assert.That(Vmm.Registered, Is.EqualTo(new[] { "alpha.json", "alpha.qmp" }));
        Assert.That((await Vmm.Run("list")).Error, Does.Contain("no VM runs"));
        Assert.That(Vmm.Registered, Is.Empty);
        await Vmm.StartVm("alpha");
    }

    [Test]
    public async Task Several_VMs_need_a_choice_and_a_name_is_taken_once()
    {
        await Vmm.StartVm("alpha");
        await Vmm.StartVm("beta");
        CliResult which = await Vmm.Run("status"), twice = await Vmm.Run("run", "--name", "alpha");
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
        uri = uri.Replace("SOCKET", Vmm["in.sock"], StringComparison.Ordinal);
        PeerProcess source = await Vmm.StartVm("alpha"), destination = await Vmm.StartVm("beta", "--incoming", uri);
        JsonNode result = JsonNode.Parse(await Vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--json"))!;
        Assert.That(result["status"]!.ToString(), Is.EqualTo("completed"));
        Assert.That(await Vmm.State(source), Is.EqualTo("postmigrate"));
        await WaitForState(destination, "running");
        LeakCheck.WaitFor(() => !File.Exists(Vmm["in.sock"]), "the socket is removed");
        CliResult again = await Vmm.Run("migrate", "--vm", "alpha", "--to", destination.IncomingUri);
        Assert.That((again.Code, again.Error.Contains("migrated away")), Is.EqualTo((ExitCode.Refused, true)));
    }

    [Test]
    public async Task A_VM_moves_through_a_file_and_goes_on_from_it()
    {
        PeerProcess source = await Vmm.StartVm("alpha");
        string summary = await Vmm.Ok("migrate", "--to", $"file:{Vmm["vm.mig"]}");
        Assert.That(summary, Does.Contain("completed"));
        Assert.That(await Vmm.State(source), Is.EqualTo("postmigrate"));
        PeerProcess destination = await Vmm.StartVm("beta", "--incoming", $"file:{Vmm["vm.mig"]}");
        await WaitForState(destination, "running");
    }

    [Test]
    public async Task A_bad_incoming_file_ends_the_VM_with_the_reason()
    {
        File.WriteAllText(Vmm["bad.mig"], "this is no migration stream");
        CliResult result = await Vmm.Run("run", "--memory", "1M", "--incoming", $"file:{Vmm["bad.mig"]}");
        Assert.That((result.Code, Vmm.Registered.Any()), Is.EqualTo((ExitCode.Failed, false)));
        Assert.That(result.Error, Does.Contain("incoming migration failed"));
    }

    [Test]
    public async Task A_peer_that_is_not_there_fails_the_migration_and_the_VM_goes_on()
    {
        PeerProcess source = await Vmm.StartVm("alpha");
        CliResult result = await Vmm.Run("migrate", "--to", $"unix:{Vmm["nobody"]}");
        Assert.That((result.Code, await Vmm.State(source)), Is.EqualTo((ExitCode.Unreachable, "running")));
        Assert.That(result.Error, Does.StartWith("vmm: migration failed: ").Or.Contains("\nvmm: migration failed: ").And.Contain("nobody"));
    }

    [Test]
    public async Task Garbage_leaves_the_destination_able_to_take_another_attempt()
    {
        PeerProcess source = await Vmm.StartVm("alpha"), destination = await Vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0");
        using (var garbage = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp))
        {
            await garbage.ConnectAsync(IPEndPoint.Parse(destination.IncomingUri["tcp:".Length..]));
            await garbage.SendAsync("GET / HTTP/1.0\r\n\r\n"u8.ToArray());
            try
            {
                garbage.Shutdown(SocketShutdown.Send);
                await garbage.ReceiveAsync(new byte[16]);
            }
            catch (SocketException)
            {
                // The destination closes such a connection without reading it.
            }
        }
        await Vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri);
        Assert.That(await Vmm.State(source), Is.EqualTo("postmigrate"));
        await WaitForState(destination, "running");
        Assert.That(destination.Errors, Does.Not.Contain("failed"), "garbage is no attempt");
    }

    [TestCase("interrupt", ExitCode.Cancelled)]
    [TestCase("terminate", ExitCode.Cancelled)]
    [TestCase("timeout", ExitCode.Timeout)]
    [TestCase("cancel", ExitCode.Cancelled)]
    public async Task A_migration_that_is_ended_early_leaves_the_source_running_and_the_destination_ready(string how, ExitCode expected)
    {
        (PeerProcess source, PeerProcess destination) = (await Busy("alpha"), await Vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0"));
        string[] slow = ["migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=1M"];
        using VmmCommands.Running command = Vmm.Start(how == "timeout" ? [.. slow, "--timeout", "0.5"] : slow);
        // The timeout may expire before the first round begins.
        if (how != "timeout") await command.Line("active: round 1");
        if (how == "interrupt") command.Signal(SigInt);
        if (how == "terminate") command.Signal(SigTerm);
        if (how == "cancel") await Vmm.Ok("cancel", "--vm", "alpha");
        CliResult result = await command.Finish();
        Assert.That(result.Code, Is.EqualTo(expected), result.Error);
        Assert.That((await Vmm.State(source), await Vmm.State(destination)), Is.EqualTo(("running", "inmigrate")));
        await Vmm.Ok("migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=0");
        Assert.That(await Vmm.State(source), Is.EqualTo("postmigrate"));
        await WaitForState(destination, "running");
    }

    [Test]
    public async Task A_detached_migration_can_be_watched_refuses_another_and_is_cancelled()
    {
        (PeerProcess source, PeerProcess destination) = (await Busy("alpha"), await Vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0"));
        string[] migrate = ["migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=1M"];
        await Vmm.Ok([.. migrate, "--check"]);
        Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--vm", "alpha", "--json"))!["migration"]!["status"]?.ToString(), Is.Null.Or.EqualTo("none"));
        await Vmm.Ok([.. migrate, "--detach"]);
        CliResult second = await Vmm.Run(migrate), check = await Vmm.Run([.. migrate, "--check"]);
        Assert.That((second.Code, check.Code), Is.EqualTo((ExitCode.Refused, ExitCode.Refused)), second.Error + check.Error);
        await Vmm.Ok("cancel", "--vm", "alpha");
        Assert.That(await Vmm.Ok("status", "--vm", "alpha"), Does.Match("migration +cancelled"));
        Assert.That(await Vmm.State(source), Is.EqualTo("running"));
    }

    [Test]
    public async Task A_capability_that_is_not_implemented_is_refused_by_name()
    {
        await Vmm.StartVm("alpha");
        CliResult result = await Vmm.Run("migrate", "--to", "tcp:127.0.0.1:1", "--capability", "x-colo");
        Assert.That((result.Code, result.Error.Contains("x-colo")), Is.EqualTo((ExitCode.Refused, true)));
    }

    [Test]
    public async Task Snapshots_are_saved_listed_loaded_and_deleted()
    {
        PeerProcess vm = await Vmm.StartVm("alpha");
        Assert.That((await Vmm.Run("snapshots")).Error, Does.Contain("no snapshots"));
        await Vmm.Ok("savevm", "one");
        Assert.That(await Vmm.Ok("snapshots"), Does.Contain("one"));
        Assert.That(((JsonArray)JsonNode.Parse(await Vmm.Ok("snapshots", "--json"))!)[0]!["name"]!.ToString(), Is.EqualTo("one"));
        CliResult twice = await Vmm.Run("savevm", "one"), missing = await Vmm.Run("loadvm", "two"), slash = await Vmm.Run("savevm", "a/b");
        Assert.Multiple(() =>
        {
            Assert.That((twice.Code, twice.Error.Contains("'one'")), Is.EqualTo((ExitCode.Failed, true)));
            Assert.That((missing.Code, missing.Error.Contains("'two'")), Is.EqualTo((ExitCode.Failed, true)));
            Assert.That((slash.Code is ExitCode.Failed or ExitCode.Usage, slash.Error.Contains("a/b")), Is.EqualTo((true, true)));
        });
        await Vmm.Ok("loadvm", "one");
        Assert.That(await Vmm.State(vm), Is.EqualTo("running"));
        await Vmm.Ok("delvm", "one");
        Assert.That((await Vmm.Run("delvm", "one")).Code, Is.EqualTo(ExitCode.Failed));
        Assert.That((await Vmm.Run("snapshots")).Error, Does.Contain("no snapshots"));
    }

    private static async Task<int> Exit(PeerProcess vm)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        return await vm.WaitForExit(limit.Token);
    }
}
