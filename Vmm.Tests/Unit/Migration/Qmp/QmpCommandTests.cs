using System.Text.Json.Nodes;
using NUnit.Framework;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>Commands for introspection, run state, dirty rate, jobs and descriptors (qmp 6, 7, 8.9, 9 and 11).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpCommandTests
{
    [Test]
    public void The_VM_is_described()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(wire.Return("query-status").ToJsonString(), Is.EqualTo("{\"running\":false,\"status\":\"prelaunch\"}"));
            Assert.That(wire.Return("query-name").ToJsonString(), Is.EqualTo("{\"name\":\"vm1\"}"));
            Assert.That(wire.Return("query-uuid").ToJsonString(), Is.EqualTo("{\"UUID\":\"12345678-1234-1234-1234-123456789abc\"}"));
            Assert.That(wire.Return("query-version")["package"]!.ToString(), Does.StartWith("vmm "));
        }
        using var nameless = new QmpHost(name: null);
        using QmpWire other = nameless.Client();
        Assert.That(other.Return("query-name").ToJsonString(), Is.EqualTo("{}"));
    }

    [Test]
    public void Run_state_changes_send_one_event_each_before_the_return()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        List<string> Events(string command) => wire.Run($"{{\"execute\":\"{command}\"}}").Events;
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Events("stop"), Is.Empty);
            Assert.That(Events("cont"), Is.EqualTo(new[] { "RESUME" }));
            Assert.That(Events("cont"), Is.Empty);
            Assert.That(Events("system_reset"), Is.EqualTo(new[] { "RESET false host-qmp-system-reset" }));
            Assert.That(Events("stop"), Is.EqualTo(new[] { "STOP" }));
            Assert.That(Events("stop"), Is.Empty);
            Assert.That(Events("system_reset"), Is.EqualTo(new[] { "RESET false host-qmp-system-reset" }));
        }
    }

    [Test]
    public void While_waiting_for_a_migration_stop_and_cont_only_set_autostart()
    {
        using var host = new QmpHost(incoming: true);
        using QmpWire wire = host.Client();
        (JsonObject answer, List<string> events) = wire.Run("{\"execute\":\"stop\"}");
        Assert.That(answer.ContainsKey("return") && events.Count == 0 && !host.Vm.AutoStart);
        wire.Return("cont");
        Assert.That(host.Vm.AutoStart);
        Assert.That(wire.Return("query-status")["status"]!.ToString(), Is.EqualTo("inmigrate"));
    }

    [Test]
    public void Cont_is_refused_while_the_migration_is_not_finalized()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        using (host.Vm.Bql.Acquire()) host.Vm.RunState.Stop(Vmm.Core.RunStates.RunState.FinishMigrate);
        Assert.That(wire.Error("cont"), Is.EqualTo("GenericError: Migration is not finalized yet"));
    }

    [Test]
    public async Task Quit_announces_answers_and_then_asks_the_host()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client(), other = host.Client();
        (JsonObject answer, List<string> events) = wire.Run("{\"execute\":\"quit\",\"id\":1}");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(events, Is.EqualTo(new[] { "SHUTDOWN false host-qmp-quit" }));
            Assert.That(answer["return"]!.ToJsonString(), Is.EqualTo("{}"));
            Assert.That(QmpWire.Describe(other.Read()), Is.EqualTo("SHUTDOWN false host-qmp-quit"));
        }
        Assert.That(await host.Server.QuitRequested.WaitAsync(TimeSpan.FromSeconds(20)), Is.EqualTo((0, (string?)null)));
    }

    [Test]
    public void Physical_memory_is_saved_and_bad_ranges_and_files_are_named()
    {
        using var host = new QmpHost();
        using var directory = new TempDirectory();
        using QmpWire wire = host.Client();
        byte[] pattern = [.. Enumerable.Range(0, 8192).Select(static i => (byte)i)];
        host.Vm.Memory.Write(new GuestAddress(4096), pattern);
        wire.Return("pmemsave", $"{{\"val\":4096,\"size\":8192,\"filename\":\"{directory["ram"]}\"}}");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(File.ReadAllBytes(directory["ram"]), Is.EqualTo(pattern));
            Assert.That(wire.Error("pmemsave", "{\"val\":0,\"size\":4096,\"filename\":\"/nonexist/x\"}"),
                Is.EqualTo("GenericError: Could not open '/nonexist/x': No such file or directory"));
            Assert.That(wire.Error("pmemsave", $"{{\"val\":1048575,\"size\":2,\"filename\":\"{directory["no"]}\"}}"), Does.Contain("Invalid addr"));
            Assert.That(File.Exists(directory["no"]), Is.False);
        }
    }

    [Test]
    public void The_schema_is_closed_and_describes_what_is_answered()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        JsonArray schema = wire.Return("query-qmp-schema").AsArray();
        Dictionary<string, JsonNode> byName = schema.ToDictionary(static e => e!["name"]!.ToString(), static e => e!);
        string[] commands = [.. wire.Return("query-commands").AsArray().Select(static c => c!["name"]!.ToString())];
        using (Assert.EnterMultipleScope())
        {
            foreach (string key in (string[])["type", "arg-type", "ret-type", "element-type"])
                foreach (JsonNode used in schema.SelectMany(e => Find(e!, key))) Assert.That(byName.ContainsKey(used.ToString()), $"{key} {used}");
            Assert.That(schema.Where(static e => e!["meta-type"]!.ToString() == "command").Select(static e => e!["name"]!.ToString()), Is.EquivalentTo(commands));
            Assert.That(byName["yank"]["allow-oob"]!.GetValue<bool>());
            Assert.That(byName["migrate"].ToJsonString(), Does.Not.Contain("allow-oob"));
            Assert.That(byName[byName["migrate"]["arg-type"]!.ToString()].ToJsonString(), Does.Not.Contain("detach").And.Contain("\"default\":null"));
            Assert.That(byName["[str]"]["element-type"]!.ToString(), Is.EqualTo("str"));
            Assert.That(byName["MIGRATION"]["meta-type"]!.ToString(), Is.EqualTo("event"));
        }
        foreach (string name in commands.Where(static c => c.StartsWith("query-", StringComparison.Ordinal)))
            Assert.DoesNotThrow(() => host.Server.Commands.Find(name)!.Returns.Check(wire.Return(name), name, name));
    }

    [Test]
    public void Named_descriptors_belong_to_a_client_and_are_taken_once()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client(), other = host.Client();
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        using (write)
        {
            using (Assert.EnterMultipleScope())
            {
                Assert.That(wire.Error("getfd", "{\"fdname\":\"f\"}"), Is.EqualTo("GenericError: No file descriptor supplied via SCM_RIGHTS"));
                Assert.That(wire.Error("getfd", "{\"fdname\":\"5f\"}", write), Is.EqualTo("GenericError: Parameter 'fdname' expects a name not starting with a digit"));
                Assert.That(wire.Error("getfd", "{\"fdname\":\"f\"}", write, read), Does.Contain("2 file descriptors"));
                Assert.That(wire.Error("closefd", "{\"fdname\":\"f\"}"), Is.EqualTo("GenericError: File descriptor named 'f' not found"));
            }
            wire.Return("getfd", "{\"fdname\":\"f\"}", write);
            wire.Return("getfd", "{\"fdname\":\"f\"}", write);
            Assert.That(other.Error("closefd", "{\"fdname\":\"f\"}"), Does.Contain("not found"));
            using (OwnedFd? taken = host.Engine.TakeNamedFd!("f")) Assert.That(taken, Is.Not.Null);
            Assert.That(host.Engine.TakeNamedFd!("f"), Is.Null);
            wire.Return("getfd", "{\"fdname\":\"g\"}", write);
            wire.Return("closefd", "{\"fdname\":\"g\"}");
        }
    }

    [Test]
    public void A_descriptor_sent_behind_an_ordinary_command_is_still_found()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        using (write)
        {
            wire.Send("{\"execute\":\"query-name\"}");
            wire.Send("{\"execute\":\"getfd\",\"argum", write);
            wire.Send("ents\":{\"fdname\":\"f\"}}");
            wire.Read();
            Assert.That(wire.Read().ContainsKey("return"));
        }
    }

    [Test]
    public async Task A_client_that_leaves_takes_its_descriptors_with_it()
    {
        using var host = new QmpHost();
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        {
            QmpWire wire = host.Client();
            wire.Return("getfd", "{\"fdname\":\"f\"}", write);
            write.Dispose();
            wire.Dispose();
            await wire.Served.WaitAsync(TimeSpan.FromSeconds(20));
            Assert.That(Posix.Poll(read, Posix.POLLIN, null, 20_000, out _) & Posix.POLLHUP, Is.Not.Zero, "no writer is left");
        }
    }

    [Test]
    public void Fd_sets_are_global_and_opened_by_access_mode()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client(), other = host.Client();
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        using (write)
        {
            JsonNode first = wire.Return("add-fd", null, write), second = wire.Return("add-fd", "{\"fdset-id\":7,\"opaque\":\"x\"}", read);
            using (Assert.EnterMultipleScope())
            {
                Assert.That(first["fdset-id"]!.GetValue<int>(), Is.Zero);
                Assert.That(other.Return("query-fdsets").ToJsonString(), Is.EqualTo(
                    $"[{{\"fdset-id\":0,\"fds\":[{{\"fd\":{first["fd"]}}}]}},{{\"fdset-id\":7,\"fds\":[{{\"fd\":{second["fd"]},\"opaque\":\"x\"}}]}}]"));
                Assert.That(host.Engine.OpenFdSet!(0, Posix.O_RDONLY), Is.Null);
                using (OwnedFd? opened = host.Engine.OpenFdSet!(0, Posix.O_WRONLY)) Assert.That(opened, Is.Not.Null);
                Assert.That(wire.Error("add-fd", "{\"fdset-id\":-1}", read), Is.EqualTo("GenericError: Parameter 'fdset-id' expects a non-negative value"));
                Assert.That(wire.Error("remove-fd", "{\"fdset-id\":9}"), Is.EqualTo("GenericError: File descriptor named 'fdset-id:9' not found"));
            }
            other.Return("remove-fd", "{\"fdset-id\":0}");
            other.Return("remove-fd", $"{{\"fdset-id\":7,\"fd\":{second["fd"]}}}");
            Assert.That(wire.Return("query-fdsets").AsArray(), Is.Empty);
        }
    }

    private const string Store = "\"vmstate\":\"vmm-snapshots\",\"devices\":[\"vmm-snapshots\"]";

    private static void Until(QmpWire wire, string last, List<string> events)
    {
        while (events.Count == 0 || events[^1] != last) events.Add(QmpWire.Describe(wire.Read()));
    }

    [Test]
    public void A_snapshot_job_goes_through_its_states_and_stays_until_dismissed()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        (_, List<string> events) = wire.Run($"{{\"execute\":\"snapshot-save\",\"arguments\":{{\"job-id\":\"j1\",\"tag\":\"s\",{Store}}}}}");
        Until(wire, "JOB_STATUS_CHANGE concluded j1", events);
        Assert.That(events.Select(static e => e.Split(' ')[1]), Is.EqualTo(new[] { "created", "running", "waiting", "pending", "concluded" }));
        Assert.That(wire.Return("query-jobs").ToJsonString(),
            Is.EqualTo("[{\"current-progress\":100,\"status\":\"concluded\",\"total-progress\":100,\"type\":\"snapshot-save\",\"id\":\"j1\"}]"));
        Assert.That(wire.Error("snapshot-save", $"{{\"job-id\":\"j1\",\"tag\":\"s\",{Store}}}"), Is.EqualTo("GenericError: Job ID 'j1' already in use"));
        Assert.That(wire.Run("{\"execute\":\"job-dismiss\",\"arguments\":{\"id\":\"j1\"}}").Events, Is.EqualTo(new[] { "JOB_STATUS_CHANGE null j1" }));
        Assert.That(wire.Error("job-dismiss", "{\"id\":\"j1\"}"), Is.EqualTo("GenericError: Job not found"));
        Assert.That(host.Snapshots.Calls, Is.EqualTo(new[] { "save s False" }));
    }

    [TestCase("snapshot-save", "x", "\"vmstate\":\"vmm-snapshots\",\"devices\":[]", "At least one device is required for snapshot")]
    [TestCase("snapshot-save", "x", "\"vmstate\":\"nodisk\",\"devices\":[\"nodisk\"]", "vmstate block device 'nodisk' does not exist")]
    [TestCase("snapshot-save", "x", "\"vmstate\":\"vmm-snapshots\",\"devices\":[\"nodisk\"]", "No block device node 'nodisk'")]
    [TestCase("snapshot-save", "there", Store, "Snapshot 'there' already exists in one or more devices")]
    [TestCase("snapshot-load", "nope", Store, "Snapshot 'nope' does not exist in one or more devices")]
    public void A_job_that_fails_says_why(string command, string tag, string rest, string text)
    {
        using var host = new QmpHost();
        host.Snapshots.Save("there", false, null, default);
        using QmpWire wire = host.Client();
        (_, List<string> events) = wire.Run($"{{\"execute\":\"{command}\",\"arguments\":{{\"job-id\":\"j\",\"tag\":\"{tag}\",{rest}}}}}");
        Until(wire, "JOB_STATUS_CHANGE concluded j", events);
        Assert.That(events.Select(static e => e.Split(' ')[1]), Is.EqualTo(new[] { "created", "running", "aborting", "concluded" }));
        Assert.That(wire.Return("query-jobs")[0]!["error"]!.ToString(), Is.EqualTo(text));
    }

    [Test]
    public void A_job_shows_progress_and_can_be_cancelled()
    {
        using var host = new QmpHost();
        host.Snapshots.Hold = true;
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("snapshot-save", $"{{\"job-id\":\"bad id\",\"tag\":\"s\",{Store}}}"), Is.EqualTo("GenericError: Invalid job ID 'bad id'"));
        wire.Run($"{{\"execute\":\"snapshot-save\",\"arguments\":{{\"job-id\":\"j\",\"tag\":\"s\",{Store}}}}}");
        Assert.That(host.Snapshots.Entered.Wait(20_000));
        JsonNode job = wire.Return("query-jobs")[0]!;
        Assert.That($"{job["status"]} {job["current-progress"]}/{job["total-progress"]}", Is.EqualTo("running 50/100"));
        Assert.That(wire.Error("job-dismiss", "{\"id\":\"j\"}"), Is.EqualTo("GenericError: Job 'j' in state 'running' cannot accept command verb 'dismiss'"));
        (_, List<string> events) = wire.Run("{\"execute\":\"job-cancel\",\"arguments\":{\"id\":\"j\"}}");
        Until(wire, "JOB_STATUS_CHANGE concluded j", events);
        Assert.That(wire.Return("query-jobs")[0]!["error"]!.ToString(), Is.EqualTo("Operation canceled"));
        Assert.That(host.Snapshots.List(), Is.Empty);
    }

    [TestCase("{\"calc-time\":0}", "Calculation time is out of range [50ms, 60000ms].")]
    [TestCase("{\"calc-time\":61}", "Calculation time is out of range [50ms, 60000ms].")]
    [TestCase("{\"calc-time\":9223372036854775807}", "Calculation time is out of range [50ms, 60000ms].")]
    [TestCase("{\"calc-time\":1,\"sample-pages\":1}", "sample-pages is out of range[128, 16384].")]
    [TestCase("{\"calc-time\":1,\"mode\":\"dirty-ring\"}", "mode dirty-ring is not enabled, use other method instead.")]
    public void A_dirty_rate_measurement_has_QEMUs_limits(string arguments, string text)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("calc-dirty-rate", arguments), Is.EqualTo("GenericError: " + text));
        Assert.That(wire.Return("query-dirty-rate")["status"]!.ToString(), Is.EqualTo("unstarted"));
    }

    [TestCase("page-sampling")]
    [TestCase("dirty-bitmap")]
    public void A_dirty_rate_counts_what_is_written_meanwhile(string mode)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        // Send both commands in one piece; otherwise the first measurement may end before the second command arrives.
        JsonObject first = wire.Run($"{{\"execute\":\"calc-dirty-rate\",\"arguments\":{{\"calc-time\":400,\"calc-time-unit\":\"millisecond\",\"mode\":\"{mode}\"}}}}"
            + "{\"execute\":\"calc-dirty-rate\",\"arguments\":{\"calc-time\":1}}").Answer;
        Assert.That(first.ContainsKey("return"), first.ToJsonString());
        Assert.That(wire.Read()["error"]?["desc"]?.ToString(), Is.EqualTo("the dirty rate is already being measured."));
        byte seed = 0;
        JsonNode info;
        do
        {
            seed++;
            for (ulong at = 0; at < 1 << 20; at += 4096) host.Vm.Memory.Write(new GuestAddress(at), [seed, (byte)(at >> 12)]);
            info = wire.Return("query-dirty-rate", "{\"calc-time-unit\":\"millisecond\"}");
        }
        while (info["status"]!.ToString() == "measuring");
        // The loop writes at most 1 MiB in about 0.4 s; a slow machine only lowers the rate.
        Assert.That(info["dirty-rate"]!.GetValue<long>(), Is.InRange(0, 3));
        Assert.That(info["calc-time"]!.GetValue<long>(), Is.EqualTo(400));
        Assert.That(host.Vm.Memory.IsDirtyLogging, Is.False);
    }

    [Test]
    public void A_dirty_rate_gives_way_to_a_migration()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        for (int calcMs = 100; ; calcMs *= 4)
        {
            wire.Return("calc-dirty-rate", $"{{\"calc-time\":{calcMs},\"calc-time-unit\":\"millisecond\",\"mode\":\"dirty-bitmap\"}}");
            LeakCheck.WaitFor(() => host.Vm.Memory.IsDirtyLogging || wire.Return("query-dirty-rate")["status"]!.ToString() == "measured", "the measurement did not begin");
            using (host.Vm.Bql.Acquire())
            {
                if (!host.Vm.Memory.IsDirtyLogging) continue; // On a busy machine the measurement may have ended already: try again with a longer one.
                host.Engine.Move(MigrationStatus.Active);
                host.Vm.Memory.StartDirtyLog();
                break;
            }
        }
        host.Vm.Memory.Write(new GuestAddress(8192), [1]);
        JsonNode info;
        do info = wire.Return("query-dirty-rate");
        while (info["status"]!.ToString() == "measuring");
        var marks = new DirtyBitmap(256);
        using (host.Vm.Bql.Acquire()) host.Vm.Memory.HarvestDirtyLog(host.Vm.Memory.Blocks[0], marks);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(info["status"]!.ToString(), Is.EqualTo("unstarted"));
            Assert.That(marks.IsSet(2), "the measurement leaves the migration's dirty mark");
            Assert.That(wire.Error("calc-dirty-rate", "{\"calc-time\":1}"), Is.EqualTo("GenericError: the dirty rate cannot be measured while a migration is active"));
        }
    }

    private static IEnumerable<JsonNode> Find(JsonNode node, string key) => node switch
    {
        JsonObject o => o.SelectMany(m => m.Key == key && m.Value is JsonValue ? [m.Value] : m.Value is null ? [] : Find(m.Value, key)),
        JsonArray a => a.SelectMany(e => Find(e!, key)),
        _ => [],
    };
}
