using System.Text.Json.Nodes;
using NUnit.Framework;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Parameters;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>The migration commands (qmp 8).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpMigrationCommandTests
{
    private const string EventsOn = "{\"capabilities\":[{\"capability\":\"events\",\"state\":true}]}";

    [TestCase("{\"uri\":\"tcp:127.0.0.1:4444\"}", "migrate tcp:127.0.0.1:4444")]
    [TestCase("{\"detach\":true,\"resume\":false,\"uri\":\"fd:migrate\"}", "migrate fd:migrate")]
    [TestCase("{\"uri\":\"file:/dev/fdset/0,offset=0x11921\"}", "migrate file:/dev/fdset/0,offset=0x11921")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"socket\",\"type\":\"inet\",\"host\":\"::1\",\"port\":\"0\",\"ipv6\":true}}]}",
        "migrate tcp:[::1]:0")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"socket\",\"type\":\"unix\",\"path\":\"/x\"}}]}", "migrate unix:/x")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"socket\",\"type\":\"fd\",\"str\":\"n\"}}]}", "migrate fd:n")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"exec\",\"args\":[\"/bin/sh\",\"-c\",\"cat\"]}}]}", "migrate exec:cat")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"file\",\"filename\":\"/x\",\"offset\":16}}]}", "migrate file:/x,offset=0x10")]
    public void Migrate_takes_every_form_of_address(string arguments, string call)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        wire.Return("migrate", arguments);
        Assert.That(host.Engine.Calls, Is.EqualTo(new[] { call }));
    }

    [TestCase("{}", "need either 'uri' or 'channels' argument")]
    [TestCase("{\"channels\":[]}", "need either 'uri' or 'channels' argument")]
    [TestCase("{\"uri\":\"bogus:1\"}", "unknown migration protocol: bogus:1")]
    [TestCase("{\"uri\":\"tcp:foo\"}", "error parsing address 'foo'")]
    [TestCase("{\"uri\":\"vsock:2:1\"}", "vsock: migration is not implemented in this version of vmm")]
    [TestCase("{\"uri\":\"rdma:h:1\"}", "rdma: migration is not implemented in this version of vmm")]
    [TestCase("{\"uri\":\"tcp:h:1\",\"resume\":true}", "Cannot resume if there is no paused migration")]
    [TestCase("{\"uri\":\"tcp:h:1\",\"blk\":true}", "Parameter 'blk' is unexpected")]
    [TestCase("{\"channels\":[{\"channel-type\":\"cpr\",\"addr\":{\"transport\":\"socket\",\"type\":\"unix\",\"path\":\"/x\"}}]}",
        "Channel list has no main entry")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"rdma\",\"host\":\"h\",\"port\":\"1\"}}]}",
        "migration address: transport 'rdma' is not implemented in this version of vmm")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"socket\",\"type\":\"vsock\",\"cid\":\"2\",\"port\":\"1\"}}]}",
        "migration address: socket type 'vsock' is not implemented in this version of vmm")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"file\",\"filename\":\"/x\"}}]}", "Parameter 'channels[0].addr.offset' is missing")]
    [TestCase("{\"channels\":[{\"channel-type\":\"main\",\"addr\":{\"transport\":\"socket\",\"type\":\"inet\",\"host\":\"h\",\"port\":1}}]}",
        "Invalid parameter type for 'channels[0].addr.port', expected: string")]
    public void Migrate_refuses_before_anything_starts(string arguments, string text)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("migrate", arguments), Is.EqualTo("GenericError: " + text));
        Assert.That(host.Engine.Calls, Is.Empty);
    }

    [Test]
    public void A_refusal_of_the_engine_reaches_the_client_with_its_hint()
    {
        using var host = new QmpHost();
        host.Engine.Refusal = new MigrationBlockedException("There's a migration process in progress") { Hint = "wait" };
        using QmpWire wire = host.Client();
        JsonNode error = wire.Execute("migrate", "{\"uri\":\"tcp:h:1\"}")["error"]!;
        using (Assert.EnterMultipleScope())
        {
            Assert.That(error["desc"]!.ToString(), Is.EqualTo("There's a migration process in progress"));
            Assert.That(error["__io.github.vmm_hint"]!.ToString(), Is.EqualTo("wait"));
        }
    }

    [Test]
    public void Migration_events_need_the_capability_and_precede_the_return()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Engine.Pass(2);
        host.Engine.Move(MigrationStatus.None);
        wire.Return("migrate-set-capabilities", EventsOn);
        (_, List<string> events) = wire.Run("{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:h:1\"}}");
        Assert.That(events, Is.EqualTo(new[] { "MIGRATION setup" }));
        host.Engine.Move(MigrationStatus.Active);
        host.Engine.Pass(2);
        host.Engine.Move(MigrationStatus.Completed);
        (_, events) = wire.Run("{\"execute\":\"query-name\"}");
        Assert.That(events, Is.EqualTo(new[] { "MIGRATION active", "MIGRATION_PASS 2", "MIGRATION completed" }));
    }

    [Test]
    public void Capabilities_are_all_listed_off_and_set_atomically()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        JsonArray all = wire.Return("query-migrate-capabilities").AsArray();
        Assert.That(all.Select(static c => c!["capability"]!.ToString()), Is.EqualTo(MigrationCapabilityNames.All));
        Assert.That(all.Any(static c => c!["state"]!.GetValue<bool>()), Is.False);
        Assert.That(wire.Error("migrate-set-capabilities",
            "{\"capabilities\":[{\"capability\":\"return-path\",\"state\":true},{\"capability\":\"x-colo\",\"state\":true}]}"), Does.Contain("'x-colo' is not implemented"));
        Assert.That(host.Engine.Capabilities.IsOn(MigrationCapability.ReturnPath), Is.False);
        wire.Return("migrate-set-capabilities", "{\"capabilities\":[{\"capability\":\"return-path\",\"state\":true},{\"capability\":\"x-colo\",\"state\":false}]}");
        Assert.That(host.Engine.Capabilities.IsOn(MigrationCapability.ReturnPath));
        host.Engine.Move(MigrationStatus.Active);
        Assert.That(wire.Error("migrate-set-capabilities", EventsOn), Is.EqualTo("GenericError: There's a migration process in progress"));
    }

    [Test]
    public void Parameters_have_QEMUs_names_and_defaults()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        JsonObject all = wire.Return("query-migrate-parameters").AsObject();
        string[] expected =
        [
            "announce-initial=50", "announce-max=550", "announce-rounds=5", "announce-step=100", "throttle-trigger-threshold=50", "cpu-throttle-initial=20",
            "cpu-throttle-increment=10", "cpu-throttle-tailslow=false", "tls-creds=\"\"", "tls-hostname=\"\"", "tls-authz=\"\"", "max-bandwidth=134217728",
            "avail-switchover-bandwidth=0", "downtime-limit=300", "x-checkpoint-delay=20000", "multifd-channels=2", "xbzrle-cache-size=67108864",
            "max-postcopy-bandwidth=0", "max-cpu-throttle=99", "multifd-compression=\"none\"", "multifd-zlib-level=1", "multifd-qatzip-level=1",
            "multifd-zstd-level=1", "x-vcpu-dirty-limit-period=1000", "vcpu-dirty-limit=1", "mode=\"normal\"", "zero-page-detection=\"multifd\"",
            "direct-io=false", "cpr-exec-command=[]", "x-rdma-chunk-size=1048576",
            // vmm's own
            "x-multifd-flush-after-each-section=false", "x-downtime-floor=true", "x-downtime-limit-max=0", "x-precopy-deadline=0", "x-precopy-deadline-action=\"cancel\"",
            "x-setup-timeout=30000", "x-progress-timeout=30000", "x-switchover-timeout=10000", "x-confirm-timeout=30000", "x-final-word-timeout=60000",
        ];
        Assert.That(all.Select(static p => $"{p.Key}={p.Value!.ToJsonString()}"), Is.EquivalentTo(expected));
        // A client may set every parameter to the value that it has.
        wire.Return("migrate-set-parameters", all.ToJsonString());
    }

    [TestCase("{\"downtime-limit\":2000001}", "Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms")]
    [TestCase("{\"multifd-channels\":0}", "Option multifd-channels expects a value between 1 and 255")]
    [TestCase("{\"throttle-trigger-threshold\":0}", "Option throttle-trigger-threshold expects an integer in the range of 1 to 100")]
    [TestCase("{\"announce-max\":100001}", "Option announce-max expects a value between 0 and 100000")]
    [TestCase("{\"multifd-zstd-level\":21}", "Option multifd-zstd-level expects a value between 0 and 20")]
    [TestCase("{\"xbzrle-cache-size\":5000}", "Option xbzrle-cache-size expects a power of two no less than the target page size")]
    [TestCase("{\"multifd-qatzip-level\":8}", "parameter 'multifd-qatzip-level' is not implemented in this version of vmm")]
    [TestCase("{\"x-precopy-deadline-action\":\"postcopy\"}", "value 'postcopy' of parameter 'x-precopy-deadline-action' is not implemented in this version of vmm")]
    [TestCase("{\"max-cpu-throttle\":19}", "Option max-cpu-throttle expects an integer in the range of cpu-throttle-initial to 99")]
    [TestCase("{\"cpu-throttle-initial\":60,\"max-cpu-throttle\":50}", "Option max-cpu-throttle expects an integer in the range of cpu-throttle-initial to 99")]
    [TestCase("{\"tls-creds\":\"t\"}", "parameter 'tls-creds' is not implemented in this version of vmm")]
    [TestCase("{\"mode\":\"bogus\"}", "Parameter 'mode' does not accept value 'bogus'")]
    [TestCase("{\"direct-io\":true}", "parameter 'direct-io' is not implemented in this version of vmm")]
    public void A_bad_parameter_is_named_and_changes_nothing(string arguments, string text)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("migrate-set-parameters", "{\"max-bandwidth\":7," + arguments[1..]), Is.EqualTo("GenericError: " + text));
        Assert.That(host.Engine.Parameters, Is.EqualTo(new MigrationParameters()));
    }

    [Test]
    public void Parameters_that_are_honoured_reach_the_engine()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        wire.Return("migrate-set-parameters", "{\"max-bandwidth\":0,\"downtime-limit\":5,\"avail-switchover-bandwidth\":9,\"zero-page-detection\":\"none\",\"tls-creds\":null}");
        Assert.That(host.Engine.Parameters, Is.EqualTo(new MigrationParameters
        {
            MaxBandwidthBytesPerSecond = 0, DowntimeLimitMs = 5, AvailSwitchoverBandwidthBytesPerSecond = 9, ZeroPageDetection = ZeroPageDetection.None,
        }));
    }

    private static readonly MigrationInfo s_full = new()
    {
        TotalTimeMs = 1203, SetupTimeMs = 3, ExpectedDowntimeMs = 300, DowntimeMs = 24.6, RemainingBytes = 243269632,
        Ram = new RamStats
        {
            TransferredBytes = 27316534, RemainingBytes = 241172480, TotalBytes = 268435456, NormalPages = 6656, Mbps = 168.10128, PagesPerSecond = 5120,
            DirtySyncCount = 1, PrecopyBytes = 27316330, DirtyPagesRate = 4,
        },
        Downtime = new DowntimeReport { TotalMs = 24.6 },
        Error = new MigrationError { Side = "destination", Phase = "load", Message = "boom", Section = "ram/0", Offset = 12 },
        SocketAddresses = [new MigrationAddress { Transport = MigrationTransport.Tcp, Host = "127.0.0.1", Port = 38473 }],
    };

    private const string Ours = "__io.github.vmm_";

    [TestCase(MigrationStatus.None, false, "")]
    [TestCase(MigrationStatus.Setup, false, "status")]
    [TestCase(MigrationStatus.Active, false, "downtime expected-downtime ram remaining setup-time status total-time")]
    [TestCase(MigrationStatus.PreSwitchover, false, "downtime expected-downtime ram remaining setup-time status total-time")]
    [TestCase(MigrationStatus.Device, false, "downtime expected-downtime ram remaining setup-time status total-time")]
    [TestCase(MigrationStatus.Completed, false, "downtime ram setup-time status total-time")]
    [TestCase(MigrationStatus.Failing, false, "error-desc status __error")]
    [TestCase(MigrationStatus.Failed, false, "error-desc status __error")]
    [TestCase(MigrationStatus.Cancelled, false, "status")]
    [TestCase(MigrationStatus.Setup, true, "socket-address status")]
    [TestCase(MigrationStatus.Active, true, "socket-address status")]
    [TestCase(MigrationStatus.Completed, true, "status")]
    [TestCase(MigrationStatus.Failed, true, "error-desc socket-address status __error")]
    public void Query_migrate_has_the_members_of_the_state(MigrationStatus status, bool incoming, string members)
    {
        using var host = new QmpHost(incoming);
        using QmpWire wire = host.Client();
        host.Engine.Info = s_full with { IsIncoming = incoming };
        host.Engine.Move(status);
        JsonObject info = wire.Return("query-migrate").AsObject();
        string[] expected = [.. members.Replace("__", Ours, StringComparison.Ordinal).Split(' ', StringSplitOptions.RemoveEmptyEntries)];
        Assert.That(info.Select(static m => m.Key).Where(static k => k != Ours + "downtime"), Is.EquivalentTo(expected));
        Assert.That(info.ContainsKey(Ours + "downtime"), Is.EqualTo(status != MigrationStatus.None));
    }

    [Test]
    public void Query_migrate_counts_as_QEMU_does()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Engine.Info = s_full;
        host.Engine.Move(MigrationStatus.Active);
        JsonObject ram = wire.Return("query-migrate")["ram"]!.AsObject();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(ram, Has.Count.EqualTo(17));
            Assert.That(ram["normal-bytes"]!.GetValue<long>(), Is.EqualTo(6656 * 4096));
            Assert.That(ram["remaining"]!.GetValue<long>(), Is.EqualTo(241172480));
        }
        host.Engine.Move(MigrationStatus.Completed);
        JsonNode info = wire.Return("query-migrate");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(info["ram"]!["remaining"]!.GetValue<long>(), Is.Zero);
            Assert.That(info["ram"]!["dirty-pages-rate"]!.GetValue<long>(), Is.Zero);
            Assert.That(info["downtime"]!.ToJsonString(), Is.EqualTo("25"));
            Assert.That(info[Ours + "downtime"]!["total-ms"]!.GetValue<double>(), Is.EqualTo(24.6));
        }
        host.Engine.Move(MigrationStatus.Failed);
        info = wire.Return("query-migrate");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(info["error-desc"]!.ToString(), Is.EqualTo("destination, load: boom"));
            Assert.That(info[Ours + "error"]!.ToJsonString(), Does.Contain("\"section\":\"ram/0\"").And.Contain("\"offset\":12"));
        }
    }

    [Test]
    public void The_listening_address_and_blockers_are_shown_as_QEMU_does()
    {
        using var host = new QmpHost(incoming: true);
        using QmpWire wire = host.Client();
        host.Engine.Info = s_full with { IsIncoming = true, BlockedReasons = ["r1"], Downtime = null };
        Assert.That(wire.Return("query-migrate").ToJsonString(), Is.EqualTo("{\"blocked-reasons\":[\"r1\"]}"));
        wire.Return("migrate-incoming", "{\"uri\":\"tcp:127.0.0.1:0\"}");
        Assert.That(wire.Return("query-migrate")["socket-address"]!.ToJsonString(),
            Is.EqualTo("[{\"port\":\"38473\",\"ipv4\":true,\"host\":\"127.0.0.1\",\"type\":\"inet\"}]"));
    }

    [Test]
    public void Incoming_needs_incoming_and_comes_once()
    {
        using var idle = new QmpHost();
        using QmpWire other = idle.Client();
        Assert.That(other.Error("migrate-incoming", "{\"uri\":\"tcp::0\"}"), Is.EqualTo("GenericError: '-incoming' was not specified on the command line"));
        using var host = new QmpHost(incoming: true);
        using QmpWire wire = host.Client();
        wire.Return("migrate-incoming", "{\"uri\":\"tcp::0\",\"exit-on-error\":false}");
        Assert.That(wire.Error("migrate-incoming", "{\"uri\":\"tcp::0\"}"), Is.EqualTo("GenericError: The incoming migration has already been started"));
        host.Engine.Move(MigrationStatus.Failed);
        wire.Return("migrate-incoming", "{\"uri\":\"tcp::0\",\"exit-on-error\":false}");
        Assert.That(host.Server.QuitRequested.IsCompleted, Is.False);
    }

    [Test]
    public async Task A_failed_incoming_migration_ends_the_process_unless_told_otherwise()
    {
        using var host = new QmpHost(incoming: true);
        using QmpWire wire = host.Client();
        host.Engine.Info = s_full;
        wire.Return("migrate-incoming", "{\"uri\":\"tcp::0\"}");
        host.Engine.Move(MigrationStatus.Failed);
        (int, string?) quit = await host.Server.QuitRequested.WaitAsync(TimeSpan.FromSeconds(20));
        Assert.That(quit, Is.EqualTo((1, (string?)"destination, load: boom")));
    }

    [Test]
    public void Continue_wants_the_state_that_is()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("migrate-continue", "{\"state\":\"pre-switchover\"}"), Is.EqualTo("GenericError: Migration not in expected state: none"));
        Assert.That(wire.Error("migrate-continue", "{\"state\":\"none\"}"), Is.EqualTo("GenericError: Migration not in expected state: none"));
        host.Engine.Move(MigrationStatus.PreSwitchover);
        wire.Return("migrate-continue", "{\"state\":\"pre-switchover\"}");
        wire.Return("migrate_cancel");
        Assert.That(host.Engine.Calls, Is.EqualTo(new[] { "continue pre-switchover", "cancel" }));
    }

    [Test]
    public void Yank_finds_a_migration_only_while_one_runs()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        const string migration = "{\"instances\":[{\"type\":\"migration\"}]}";
        Assert.That(wire.Error("yank", migration), Is.EqualTo("DeviceNotFound: Instance not found"));
        Assert.That(wire.Return("query-yank").ToJsonString(), Is.EqualTo("[]"));
        host.Engine.Move(MigrationStatus.Active);
        Assert.That(wire.Return("query-yank").ToJsonString(), Is.EqualTo("[{\"type\":\"migration\"}]"));
        Assert.That(wire.Error("yank", "{\"instances\":[{\"type\":\"chardev\",\"id\":\"c\"}]}"), Is.EqualTo("DeviceNotFound: Instance not found"));
        wire.Return("yank", migration);
        Assert.That(host.Engine.Calls, Is.EqualTo(new[] { "yank" }));
    }

    [Test]
    public void Old_tools_find_the_migration_thread_but_the_schema_does_not_show_it()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Return("query-migrationthreads").AsArray(), Is.Empty);
        host.Engine.Move(MigrationStatus.Active);
        Assert.That(wire.Return("query-migrationthreads")[0]!["name"]!.ToString(), Is.EqualTo("live_migration"));
        Assert.That(wire.Return("query-commands").ToJsonString(), Does.Not.Contain("migrationthreads"));
    }
}
