using System.Text.Json.Nodes;
using Vmm.Tests.Fakes;
using Vmm.Tools.Cli;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

internal sealed class CommandTests
{
    private const string Active = """{"status": "active", "total-time": 5, "ram": {"total": 100, "remaining": 50, "transferred": 50}}""";
    private const string Completed = """{"status": "completed", "total-time": 9, "downtime": 3, "ram": {"total": 100, "remaining": 0, "transferred": 100, "dirty-sync-count": 2}}""";

    private static Task<CliResult> Run(FakeMonitor vm, string line, CancellationToken interrupted = default) => vm.Run(line.Split(' '), interrupted);

    [TestCase("")]
    [TestCase("bogus")]
    [TestCase("migrate")]
    [TestCase("migrate --to")]
    [TestCase("migrate --to tcp:h:1 --bogus")]
    [TestCase("migrate --to tcp:h:1 --to tcp:h:2")]
    [TestCase("migrate --to tcp:h:1 --detach --check")]
    [TestCase("savevm")]
    [TestCase("savevm a b")]
    [TestCase("run --memory")]
    [TestCase("stop --vm a")]
    public async Task A_wrong_command_line_is_usage_with_one_line_on_stderr_and_nothing_tried(string line)
    {
        var vm = new FakeMonitor();
        CliResult result = await vm.Run(line.Split(' ', StringSplitOptions.RemoveEmptyEntries));
        Assert.Multiple(() =>
        {
            Assert.That(result.Code, Is.EqualTo(ExitCode.Usage));
            Assert.That(result.Error, Does.StartWith("vmm: "));
            Assert.That(result.Error.TrimEnd('\n'), Does.Not.Contain('\n'));
            Assert.That(result.Out, Is.Empty);
            Assert.That(vm.Log, Is.Empty);
        });
    }

    [Test]
    public async Task An_unknown_word_is_named() => Assert.That((await Run(new FakeMonitor(), "frobnicate")).Error, Does.Contain("'frobnicate'"));

    [Test]
    public async Task A_migration_is_set_up_started_followed_and_summed_up()
    {
        FakeMonitor vm = new FakeMonitor().On("query-migrate", "{}", """{"status": "setup"}""", Active, Completed);
        CliResult result = await Run(vm, "migrate --to tcp:h:1 --set downtime-limit=50");
        Assert.Multiple(() =>
        {
            Assert.That(result.Code, Is.EqualTo(ExitCode.Ok));
            Assert.That(result.Out, Does.Contain("status").And.Contain("completed").And.Contain("3 ms"));
            Assert.That(result.Error, Does.Contain("setup\n").And.Contain("50 B of 100 B left"));
            Assert.That(vm.Log.Where(static l => l.StartsWith("migrate", StringComparison.Ordinal)), Is.EqualTo(new[]
            {
                """migrate-set-capabilities {"capabilities":[{"capability":"return-path","state":true}]}""",
                """migrate-set-parameters {"downtime-limit":50}""",
                """migrate {"uri":"tcp:h:1"}""",
            }));
            Assert.That(vm.IsDisposed);
        });
    }

    [Test]
    public async Task A_failed_migration_ends_with_one_and_its_reason()
    {
        CliResult result = await Run(new FakeMonitor().On("query-migrate", "{}", """{"status": "failed", "error-desc": "no such luck"}"""), "migrate --to tcp:h:1");
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, "vmm: migration failed: no such luck\n")));
    }

    [TestCase("""{"status": "failed", "error-desc": "x", "__io.github.vmm_error": {"phase": "connect"}}""")]
    [TestCase("""{"status": "failed", "error-desc": "Failed to connect to '127.0.0.1:1': Connection refused"}""")]
    public async Task A_destination_that_cannot_be_reached_has_a_code_of_its_own(string answer) =>
        Assert.That((await Run(new FakeMonitor().On("query-migrate", "{}", answer), "migrate --to tcp:h:1")).Code, Is.EqualTo(ExitCode.Unreachable));

    [Test]
    public async Task A_parameter_out_of_range_is_usage_and_a_capability_that_is_not_to_be_had_a_refusal()
    {
        CliResult parameter = await Run(new FakeMonitor().Fail("migrate-set-parameters", "Option downtime-limit expects"), "migrate --to tcp:h:1 --set downtime-limit=5");
        CliResult capability = await Run(new FakeMonitor().Fail("migrate-set-capabilities", "no such thing"), "migrate --to tcp:h:1");
        Assert.That((parameter.Code, capability.Code), Is.EqualTo((ExitCode.Usage, ExitCode.Refused)));
    }

    [Test]
    public async Task A_snapshot_that_does_not_exist_cannot_be_deleted()
    {
        FakeMonitor vm = new FakeMonitor().On("human-monitor-command", "\"There is no snapshot available.\\r\\n\"");
        CliResult result = await Run(vm, "delvm s");
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, "vmm: snapshot 's' does not exist\n")));
    }

    [Test]
    public async Task Interrupting_cancels_once_and_settles()
    {
        using var interrupt = new CancellationTokenSource();
        FakeMonitor vm = new FakeMonitor().On("query-migrate", "{}", Active, Active, """{"status": "cancelling"}""", """{"status": "cancelled"}""");
        vm.Before("migrate", interrupt.Cancel);
        CliResult result = await Run(vm, "migrate --to tcp:h:1", interrupt.Token);
        Assert.Multiple(() =>
        {
            Assert.That(result.Code, Is.EqualTo(ExitCode.Cancelled));
            Assert.That(vm.Log.Count(static l => l == "migrate_cancel"), Is.EqualTo(1));
            Assert.That(result.Error, Does.Contain("cancelled; the VM goes on here"));
        });
    }

    [Test]
    public async Task A_migration_that_completes_in_spite_of_Ctrl_C_is_a_success()
    {
        using var interrupt = new CancellationTokenSource();
        FakeMonitor vm = new FakeMonitor().On("query-migrate", "{}", Active, Completed);
        vm.Before("migrate", interrupt.Cancel);
        CliResult result = await Run(vm, "migrate --to tcp:h:1", interrupt.Token);
        Assert.That((result.Code, result.Error.Contains("before it could be cancelled")), Is.EqualTo((ExitCode.Ok, true)));
    }

    [Test]
    public async Task A_deadline_cancels_with_a_code_of_its_own()
    {
        FakeMonitor vm = new FakeMonitor().On("query-migrate", "{}", Active, Active, """{"status": "cancelled"}""");
        CliResult result = await Run(vm, "migrate --to tcp:h:1 --timeout 0.000001");
        Assert.That((result.Code, vm.Log.Contains("migrate_cancel")), Is.EqualTo((ExitCode.Timeout, true)));
    }

    [TestCase("query-status", """{"status": "inmigrate"}""", "waits for an incoming migration")]
    [TestCase("query-status", """{"status": "postmigrate"}""", "migrated away")]
    [TestCase("query-migrate", """{"status": "active"}""", "another migration runs")]
    [TestCase("query-migrate", """{"blocked-reasons": ["device x says no"]}""", "device x says no")]
    public async Task A_VM_that_cannot_migrate_now_refuses_and_says_why(string command, string answer, string expected)
    {
        FakeMonitor vm = new FakeMonitor().On(command, answer);
        CliResult result = await Run(vm, "migrate --to tcp:h:1");
        Assert.That((result.Code, vm.Log.Exists(static l => l.StartsWith("migrate {", StringComparison.Ordinal))), Is.EqualTo((ExitCode.Refused, false)));
        Assert.That(result.Error, Does.Contain(expected));
    }

    [Test]
    public async Task A_refusal_at_the_start_is_a_refusal_and_another_error_a_failure()
    {
        CliResult refused = await Run(new FakeMonitor().Fail("migrate", "There's a migration process in progress"), "migrate --to tcp:h:1");
        CliResult failed = await Run(new FakeMonitor().Fail("migrate", "Could not create '/x': No such file or directory"), "migrate --to file:/x");
        Assert.That((refused.Code, failed.Code), Is.EqualTo((ExitCode.Refused, ExitCode.Failed)));
    }

    [Test]
    public async Task A_dry_run_sets_back_what_it_set_and_starts_nothing()
    {
        var vm = new FakeMonitor();
        CliResult result = await Run(vm, "migrate --to tcp:h:1 --check --set max-bandwidth=1M");
        Assert.Multiple(() =>
        {
            Assert.That(result.Code, Is.EqualTo(ExitCode.Ok));
            Assert.That(vm.Log.Where(static l => l.StartsWith("migrate", StringComparison.Ordinal)), Is.EqualTo(new[]
            {
                """migrate-set-capabilities {"capabilities":[{"capability":"return-path","state":true}]}""",
                """migrate-set-capabilities {"capabilities":[{"capability":"return-path","state":false},{"capability":"events","state":false}]}""",
                """migrate-set-parameters {"max-bandwidth":1048576}""",
                """migrate-set-parameters {"max-bandwidth":134217728}""",
            }));
        });
    }

    [Test]
    public async Task A_dry_run_refuses_a_file_in_a_missing_directory() =>
        Assert.That((await Run(new FakeMonitor(), "migrate --to file:/nonexistent/dir/x --check")).Code, Is.EqualTo(ExitCode.Refused));

    [Test]
    public async Task Detached_it_returns_at_once()
    {
        FakeMonitor vm = new FakeMonitor().On("query-migrate", "{}", Active);
        CliResult result = await Run(vm, "migrate --to tcp:h:1 --detach --json");
        Assert.That((result.Code, result.Out.Contains("\"active\"")), Is.EqualTo((ExitCode.Ok, true)));
    }

    [Test]
    public async Task Cont_lets_a_migration_that_waits_go_on()
    {
        FakeMonitor vm = new FakeMonitor().On("query-migrate", """{"status": "pre-switchover"}""").On("migrate-continue", "{}");
        await Run(vm, "cont");
        Assert.That(vm.Log, Does.Contain("""migrate-continue {"state":"pre-switchover"}""").And.Not.Contain("cont"));
    }

    [Test]
    public async Task A_state_that_does_not_allow_cont_is_a_refusal() =>
        Assert.That((await Run(new FakeMonitor().Fail("cont", "Resetting the Virtual Machine is required"), "cont")).Code, Is.EqualTo(ExitCode.Refused));

    [Test]
    public async Task Cancel_waits_until_it_has_settled_and_is_refused_too_late()
    {
        CliResult settled = await Run(new FakeMonitor().On("query-migrate", Active, """{"status": "cancelling"}""", """{"status": "cancelled"}"""), "cancel");
        CliResult late = await Run(new FakeMonitor().On("query-migrate", Active, Completed), "cancel");
        CliResult idle = await Run(new FakeMonitor(), "cancel");
        Assert.That((settled.Code, late.Code, idle.Code), Is.EqualTo((ExitCode.Ok, ExitCode.Refused, ExitCode.Ok)));
    }

    [Test]
    public async Task Status_prints_data_on_stdout_only()
    {
        CliResult result = await Run(new FakeMonitor().On("query-migrate", Completed), "status");
        Assert.Multiple(() =>
        {
            Assert.That(result.Out, Does.Match(@"name +vm1\nstate +running\n").And.Match(@"migration +completed\n"));
            Assert.That(result.Error, Is.Empty);
        });
    }

    [Test]
    public async Task Status_as_JSON_carries_the_VMs_own_answers()
    {
        CliResult result = await Run(new FakeMonitor().On("query-migrate", Completed), "status --json");
        Assert.That(JsonNode.Parse(result.Out)!["migration"]!["ram"]!["dirty-sync-count"]!.GetValue<int>(), Is.EqualTo(2));
    }

    [Test]
    public async Task A_snapshot_job_is_followed_dismissed_and_its_error_told()
    {
        FakeMonitor good = new FakeMonitor().WithJob(""), bad = new FakeMonitor().WithJob(""", "error": "Snapshot 's' already exists in one or more devices" """);
        CliResult ok = await Run(good, "savevm s"), failed = await Run(bad, "savevm s");
        Assert.Multiple(() =>
        {
            Assert.That((ok.Code, ok.Out), Is.EqualTo((ExitCode.Ok, "snapshot 's' saved\n")));
            Assert.That((failed.Code, failed.Error), Is.EqualTo((ExitCode.Failed, "vmm: snapshot 's': Snapshot 's' already exists in one or more devices\n")));
            Assert.That(bad.Log.Count(static l => l.StartsWith("job-dismiss", StringComparison.Ordinal)), Is.EqualTo(1));
        });
    }

    [Test]
    public async Task Options_that_exclude_each_other_are_usage() =>
        Assert.That((await Run(new FakeMonitor(), "status --vm a")).Code, Is.EqualTo(ExitCode.Usage));

    [Test]
    public async Task The_layout_of_every_device_is_dumped_in_QEMUs_shape()
    {
        using var output = new StringWriter();
        await CliRoot.Invoke(["vmstate", "dump"], new CliContext { Out = output, Error = TextWriter.Null });
        JsonNode dump = JsonNode.Parse(output.ToString())!;
        Assert.That((dump["vmschkmachine"]!["Name"]!.ToString(), dump["serial"]!["Description"]!["version_id"]!.GetValue<int>()), Is.EqualTo(("none", 3)));
    }

    [Test]
    public async Task Help_names_the_exit_codes()
    {
        using var output = new StringWriter();
        await CliRoot.Invoke(["--help"], new CliContext { Out = output, Error = TextWriter.Null });
        foreach (string code in new[] { "0 done", "1 the operation failed", "2 wrong usage", "3 refused", "4 peer not reachable", "124 timed out", "130 cancelled" })
            Assert.That(output.ToString().ReplaceLineEndings(" "), Does.Contain(code));
    }
}
