using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>When something goes wrong between real processes, users see one line with the cause, and nothing is lost or left behind.</summary>
internal sealed class EndToEndFailureTests : EndToEnd
{
    [Test]
    public async Task A_destination_that_is_killed_fails_the_migration_and_the_source_goes_on()
    {
        (PeerProcess source, PeerProcess destination) = await Pair();
        CliResult result = await KillWhileMigrating(destination, destination);
        Assert.That((result.Code, await Vmm.State(source)), Is.EqualTo((ExitCode.Failed, "running")), result.Error);
        Assert.That(LastLine(result), Does.StartWith("vmm: migration failed: "));
    }

    [Test]
    public async Task A_source_that_is_killed_leaves_the_destination_able_to_take_another()
    {
        (PeerProcess source, PeerProcess destination) = await Pair();
        CliResult result = await KillWhileMigrating(source, destination);
        Assert.That(result.Code, Is.EqualTo(ExitCode.Unreachable), result.Error);
        PeerProcess second = await Busy("gamma");
        await Vmm.Ok("migrate", "--vm", "gamma", "--to", destination.IncomingUri, "--set", "max-bandwidth=0");
        Assert.That(await Vmm.State(second), Is.EqualTo("postmigrate"));
        await WaitForState(destination, "running");
    }

    [Test]
    public async Task A_full_disk_fails_the_migration_and_names_the_cause()
    {
        PeerProcess source = await Busy("alpha");
        CliResult result = await Vmm.Run("migrate", "--to", "exec:cat > /dev/full", "--set", "max-bandwidth=0");
        Assert.That((result.Code, await Vmm.State(source)), Is.EqualTo((ExitCode.Failed, "running")), result.Error);
        CliResult file = await Vmm.Run("migrate", "--to", $"file:{Vmm["missing/x.mig"]}");
        Assert.That((file.Code, file.Error.Contains("missing/x.mig")), Is.EqualTo((ExitCode.Failed, true)), file.Error);
    }

    [Test]
    public async Task A_full_disk_fails_a_snapshot_that_leaves_nothing_behind_and_the_VM_runs_on()
    {
        if (Shell.Run("unshare", "-m", "true").Status != 0) Assert.Ignore("no mount namespace here");
        string store = Vmm["store"];
        VmmCommands.Running run = Vmm.StartThrough(["unshare", "-m", "sh"], $"mkdir {store} && mount -t tmpfs -o size=1m none {store} && exec \"$@\"",
            "run", "--name", "alpha", "--memory", "64M", "--workload", "pattern,rate=10M,prefill=on", "--snapshot-dir", store);
        await run.Line("ready:");
        CliResult saved = await Vmm.Run("savevm", "s", "--vm", "alpha");
        Assert.That((saved.Code, saved.Error), Is.EqualTo((ExitCode.Failed, saved.Error)));
        Assert.That(saved.Error, Does.Contain("No space left on device"));
        Assert.That(Directory.GetFileSystemEntries($"/proc/{run.Pid}/root{store}"), Is.Empty);
        Assert.That(await Vmm.Ok("status", "--vm", "alpha"), Does.Contain("running"));
        await Vmm.Ok("quit", "--vm", "alpha");
    }

    [Test]
    public async Task A_FIFO_without_a_peer_holds_no_command_up()
    {
        string fifo = Vmm["fifo"];
        Assert.That(Shell.Run("mkfifo", fifo).Status, Is.Zero);
        PeerProcess source = await Busy("alpha");
        CliResult sent = await Vmm.Run("migrate", "--vm", "alpha", "--to", $"file:{fifo}");
        Assert.That((sent.Code, await Vmm.State(source)), Is.EqualTo((ExitCode.Failed, "running")), sent.Error);
        Assert.That(sent.Error, Does.Contain($"nobody reads the FIFO '{fifo}'"));
        VmmCommands.Running waits = Vmm.Start("run", "--name", "beta", "--memory", "64M", "--incoming", $"file:{fifo}");
        await waits.Line("ready:");
        waits.Signal(SigTerm);
        CliResult ended = await waits.Finish();
        Assert.That((ended.Code, ended.Error), Is.EqualTo((ExitCode.Ok, ended.Error)));
        await Vmm.Ok("quit", "--vm", "alpha");
    }

    [Test]
    public async Task Another_RAM_size_is_named_on_both_sides()
    {
        PeerProcess source = await Busy("alpha"), destination = await Vmm.StartVmOf("beta", "32M", "--incoming", "tcp:127.0.0.1:0");
        CliResult result = await Vmm.Run("migrate", "--vm", "alpha", "--to", destination.IncomingUri);
        LeakCheck.WaitFor(() => destination.Errors.Contains("incoming migration failed", StringComparison.Ordinal), "the destination says that it failed");
        Assert.Multiple(async () =>
        {
            Assert.That(result.Code, Is.EqualTo(ExitCode.Failed));
            Assert.That(LastLine(result), Does.Contain("ram").And.Contain("destination"));
            Assert.That(destination.Errors, Does.Contain("incoming migration failed").And.Contain("ram"));
            Assert.That((await Vmm.State(source), await Vmm.State(destination)), Is.EqualTo(("running", "inmigrate")));
        });
    }

    [Test]
    public async Task Failed_and_cancelled_migrations_leave_no_descriptors_and_threads_behind()
    {
        (PeerProcess source, PeerProcess destination) = await Pair();
        async Task Round()
        {
            Assert.That((await Vmm.Run("migrate", "--vm", "alpha", "--to", $"unix:{Vmm["nobody"]}")).Code, Is.EqualTo(ExitCode.Unreachable));
            Assert.That((await Vmm.Run([.. Slow(destination), "--timeout", "0.2"])).Code, Is.EqualTo(ExitCode.Timeout));
        }

        // The first round creates what the process keeps: pool threads, timers, compiled code.
        await Round();
        (List<string> source1, List<string> destination1) = (LeakCheck.Descriptors(source.Pid), LeakCheck.Descriptors(destination.Pid));
        for (int i = 0; i < 5; i++) await Round();
        LeakCheck.NoMoreThan(source1, source.Pid);
        LeakCheck.NoMoreThan(destination1, destination.Pid);
        LeakCheck.WaitFor(() => LeakCheck.Threads(source.Pid).Count == 0, "threads of the migrations are left");
    }

    [Test]
    public async Task The_demo_succeeds_and_leaves_nothing()
    {
        string temp = Directory.CreateDirectory(Vmm["tmp"]).FullName;
        using VmmCommands.Running demo = Vmm.StartIn(temp, "demo");
        // The demo runs several moves, guests and a QEMU one after another, and each has its own deadline.
        CliResult result = await demo.Finish(4 * VmmCommands.Deadline);
        Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), result.Error);
        Assert.That(result.Out, Does.Contain("verified: all 131072 pages on the destination").And.Match("all 131072 pages are the same in QEMU|QEMU is not installed"));
        Assert.That(Directory.EnumerateFileSystemEntries(temp, "vmm-*"), Is.Empty);
    }

    [Test]
    public async Task A_demo_that_is_ended_early_leaves_nothing()
    {
        string temp = Directory.CreateDirectory(Vmm["tmp"]).FullName;
        using VmmCommands.Running demo = Vmm.StartIn(temp, "demo");
        await demo.Line("active: round 1");
        demo.Signal(SigTerm);
        CliResult result = await demo.Finish();
        Assert.That(result.Code, Is.EqualTo(ExitCode.Cancelled), result.Error);
        Assert.That(Directory.EnumerateFileSystemEntries(temp, "vmm-*"), Is.Empty);
        Assert.That(Directory.EnumerateDirectories("/proc").Where(p => Mentions(p, temp)), Is.Empty);
    }

    private async Task<CliResult> KillWhileMigrating(PeerProcess victim, PeerProcess destination)
    {
        using VmmCommands.Running migration = Vmm.Start(Slow(destination));
        await migration.Line("active: round 1");
        Posix.Kill(victim.Pid, SigKill);
        return await migration.Finish();
    }

    private async Task<(PeerProcess Source, PeerProcess Destination)> Pair() => (await Busy("alpha"), await Vmm.StartVm("beta", "--incoming", "tcp:127.0.0.1:0"));

    private static string[] Slow(PeerProcess destination) => ["migrate", "--vm", "alpha", "--to", destination.IncomingUri, "--set", "max-bandwidth=1M"];

    private static string LastLine(CliResult result) => result.Error.TrimEnd('\n').Split('\n')[^1];

    private static bool Mentions(string process, string text)
    {
        try
        {
            return int.TryParse(Path.GetFileName(process), out _) && File.ReadAllText(Path.Combine(process, "cmdline")).Contains(text, StringComparison.Ordinal);
        }
        catch (IOException)
        {
            return false;
        }
    }
}
