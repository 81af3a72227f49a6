using System.Text.Json.Nodes;
using Microsoft.Extensions.DependencyInjection;
using NUnit.Framework;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Migration;
using Vmm.Migration.Qmp;
using Vmm.Migration.Snapshot;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>Clients run the sequences of qmp 8.10 and 9 on the real engine.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpEngineTests
{
    private const string EventsAndMore =
        "{\"capabilities\":[{\"capability\":\"events\",\"state\":true},{\"capability\":\"return-path\",\"state\":true},{\"capability\":\"pause-before-switchover\",\"state\":true}]}";

    private const string EventsOnly = "{\"capabilities\":[{\"capability\":\"events\",\"state\":true}]}";

    [Test]
    public void A_managers_migration_over_a_passed_socket_shows_QEMUs_events_in_QEMUs_order()
    {
        using var source = new Host(TestVm.WithRam(4 << 20).FilledRandom(1));
        using var destination = new Host(TestVm.WithRam(4 << 20, incoming: true));
        source.Wire.Return("cont");
        destination.Wire.Return("migrate-set-capabilities", EventsAndMore);
        source.Wire.Return("migrate-set-capabilities", EventsAndMore);
        (_, List<string> there) = destination.Wire.Run("{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"tcp:127.0.0.1:0\"}}");
        int port = int.Parse(destination.Wire.Return("query-migrate")["socket-address"]![0]!["port"]!.ToString(), null);
        using (OwnedFd socket = Posix.Socket(Posix.AF_INET))
        {
            Posix.Connect(socket, Posix.InetAddress(System.Net.IPAddress.Loopback, port), null, 10_000);
            source.Wire.Return("getfd", "{\"fdname\":\"migrate\"}", socket);
        }
        (_, List<string> here) = source.Wire.Run("{\"execute\":\"migrate\",\"arguments\":{\"detach\":true,\"resume\":false,\"uri\":\"fd:migrate\"}}");
        source.Until("MIGRATION pre-switchover", here);
        Assert.That(source.Wire.Return("query-migrate")["status"]!.ToString(), Is.EqualTo("pre-switchover"));
        (_, List<string> more) = source.Wire.Run("{\"execute\":\"migrate-continue\",\"arguments\":{\"state\":\"pre-switchover\"}}");
        here.AddRange(more);
        source.Until("MIGRATION completed", here);
        destination.Until("MIGRATION completed", there);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(here.Where(static e => !e.StartsWith("MIGRATION_PASS", StringComparison.Ordinal)), Is.EqualTo(new[]
            {
                "MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION pre-switchover", "MIGRATION device", "MIGRATION completed",
            }));
            Assert.That(here.FirstOrDefault(static e => e.StartsWith("MIGRATION_PASS", StringComparison.Ordinal)), Is.EqualTo("MIGRATION_PASS 2"));
            Assert.That(there, Is.EqualTo(new[] { "MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed" }));
            Assert.That(source.Wire.Return("query-status")["status"]!.ToString(), Is.EqualTo("postmigrate"));
            Assert.That(source.Wire.Error("migrate", "{\"uri\":\"tcp:127.0.0.1:1\"}"), Does.Contain("Can't migrate the vm that was paused due to previous migration"));
        }
        RamAssert.AreEqual(source.Vm.Vm.Memory, destination.Vm.Vm.Memory);
        JsonNode info = source.Wire.Return("query-migrate");
        Assert.That(info.AsObject().ContainsKey("__io.github.vmm_downtime") && info["ram"]!["total"]!.GetValue<long>() == 4 << 20);
    }

    [Test]
    public void A_save_into_a_descriptor_set_leaves_the_clients_bytes_before_the_offset_alone()
    {
        using var directory = new TempDirectory();
        byte[] head = [.. Enumerable.Range(0, 0x11921).Select(static i => (byte)(i * 7))];
        File.WriteAllBytes(directory["save"], head);
        using (var source = new Host(TestVm.WithRam(1 << 20).FilledRandom(2)))
        {
            source.Wire.Return("migrate-set-capabilities", EventsOnly);
            List<string> saved, loaded;
            using (OwnedFd file = Posix.Open(directory["save"], Posix.O_WRONLY, 0, out _)!)
            {
                Assert.That(source.Wire.Return("add-fd", null, file)["fdset-id"]!.GetValue<int>(), Is.Zero);
                (_, saved) = source.Wire.Run("{\"execute\":\"migrate\",\"arguments\":{\"detach\":true,\"resume\":false,\"uri\":\"file:/dev/fdset/0,offset=0x11921\"}}");
            }
            source.Until("MIGRATION completed", saved);
            using var destination = new Host(TestVm.WithRam(1 << 20, incoming: true));
            destination.Wire.Return("migrate-set-capabilities", EventsOnly);
            using (OwnedFd file = Posix.Open(directory["save"], Posix.O_RDONLY, 0, out _)!) destination.Wire.Return("add-fd", null, file);
            (_, loaded) = destination.Wire.Run("{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"file:/dev/fdset/0,offset=0x11921\"}}");
            destination.Until("MIGRATION completed", loaded);
            RamAssert.AreEqual(source.Vm.Vm.Memory, destination.Vm.Vm.Memory);
        }
        Assert.That(File.ReadAllBytes(directory["save"]).AsSpan(0, head.Length).SequenceEqual(head));
    }

    [Test]
    public void A_failed_connection_is_told_by_events_and_by_query_migrate()
    {
        using var source = new Host(TestVm.WithRam(1 << 20));
        source.Wire.Return("cont");
        source.Wire.Return("migrate-set-capabilities", EventsOnly);
        (_, List<string> events) = source.Wire.Run("{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:127.0.0.1:1\"}}");
        source.Until("MIGRATION failed", events);
        JsonNode info = source.Wire.Return("query-migrate");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(events, Is.EqualTo(new[] { "MIGRATION setup", "MIGRATION failing", "MIGRATION failed" }));
            Assert.That(info["error-desc"]!.ToString(), Does.Contain("Failed to connect to '127.0.0.1:1': Connection refused"));
            Assert.That(info["__io.github.vmm_error"]!["side"]!.ToString(), Is.EqualTo("source"));
            Assert.That(source.Wire.Return("query-status")["running"]!.GetValue<bool>());
        }
    }

    [Test]
    public void A_client_that_saw_the_end_of_a_migration_may_start_the_next_at_once()
    {
        using var source = new Host(TestVm.WithRam(1 << 20));
        using var destination = new Host(TestVm.WithRam(1 << 20, incoming: true));
        source.Wire.Return("migrate-set-capabilities", EventsOnly);
        destination.Wire.Return("migrate-set-capabilities", EventsOnly);
        for (int i = 0; i < 50; i++)
        {
            (JsonObject answer, List<string> events) = source.Wire.Run("{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:127.0.0.1:1\"}}");
            Assert.That(answer.ContainsKey("return"), answer.ToJsonString());
            source.Until("MIGRATION failed", events);
            (answer, events) = destination.Wire.Run("{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"exec:true\",\"exit-on-error\":false}}");
            Assert.That(answer.ContainsKey("return"), answer.ToJsonString());
            destination.Until("MIGRATION failed", events);
        }
    }

    [Test]
    public void A_yank_fails_the_migration_and_the_source_goes_on()
    {
        using var source = new Host(TestVm.WithRam(4 << 20).FilledRandom(3));
        source.Wire.Return("cont");
        source.Wire.Return("migrate-set-capabilities", EventsOnly);
        source.Wire.Return("migrate-set-parameters", "{\"max-bandwidth\":65536}");
        using var listener = new System.Net.Sockets.TcpListener(System.Net.IPAddress.Loopback, 0);
        listener.Start();
        int port = ((System.Net.IPEndPoint)listener.LocalEndpoint).Port;
        (_, List<string> events) = source.Wire.Run($"{{\"execute\":\"migrate\",\"arguments\":{{\"uri\":\"tcp:127.0.0.1:{port}\"}}}}");
        source.Until("MIGRATION active", events);
        source.Wire.Return("yank", "{\"instances\":[{\"type\":\"migration\"}]}");
        LeakCheck.WaitFor(() => source.Wire.Execute("query-migrate")["return"]!["status"]!.ToString() == "failed", "the yanked migration did not fail");
        Assert.That(source.Wire.Return("query-status")["running"]!.GetValue<bool>());
    }

    [Test]
    public void Snapshots_work_through_jobs_and_through_the_human_monitor()
    {
        using var directory = new TempDirectory();
        using var vm = new TestVm(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }] },
            b => b.Services.AddSingleton(new SnapshotOptions { Directory = directory["snapshots"] }));
        using var host = new Host(vm.FilledRandom(4), vm.Vm.Snapshots());
        host.Wire.Return("cont");
        byte before = vm.Ram.ReadOnlySlice(0, 1)[0];
        (_, List<string> events) = host.Wire.Run(Job("snapshot-save", "j1", "one"));
        host.Until("JOB_STATUS_CHANGE concluded j1", events);
        Assert.That(events, Is.EqualTo(new[]
        {
            "JOB_STATUS_CHANGE created j1", "JOB_STATUS_CHANGE running j1", "STOP", "RESUME", "JOB_STATUS_CHANGE waiting j1", "JOB_STATUS_CHANGE pending j1",
            "JOB_STATUS_CHANGE concluded j1",
        }));
        vm.Vm.Memory.Write(new GuestAddress(0), [(byte)~before]);
        (_, events) = host.Wire.Run(Job("snapshot-load", "j2", "one"));
        host.Until("JOB_STATUS_CHANGE concluded j2", events);
        JsonArray jobs = host.Wire.Return("query-jobs").AsArray();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(jobs.Select(static j => j!["error"]), Is.All.Null);
            Assert.That(vm.Ram.ReadOnlySlice(0, 1)[0], Is.EqualTo(before));
            Assert.That(Human(host, "info snapshots"), Does.Contain("one"));
            Assert.That(Human(host, "savevm two") + Human(host, "savevm two") + Human(host, "loadvm two") + Human(host, "delvm two"), Is.Empty);
            Assert.That(Human(host, "loadvm two"), Is.EqualTo("Error: Snapshot 'two' does not exist in one or more devices\r\n"));
            Assert.That(Human(host, "savevm ../x"), Does.StartWith("Error: ").And.Contain("../x"));
        }
    }

    private static string Job(string command, string id, string tag) =>
        $"{{\"execute\":\"{command}\",\"arguments\":{{\"job-id\":\"{id}\",\"tag\":\"{tag}\",\"vmstate\":\"vmm-snapshots\",\"devices\":[\"vmm-snapshots\"]}}}}";

    private static string Human(Host host, string line) =>
        host.Wire.Run($"{{\"execute\":\"human-monitor-command\",\"arguments\":{{\"command-line\":\"{line}\"}}}}").Answer["return"]!.ToString();

    private sealed class Host : IDisposable
    {
        private readonly QmpServer _server;

        internal Host(TestVm vm, ISnapshotService? snapshots = null)
        {
            Vm = vm;
            _server = new QmpServer(vm.Vm, vm.Engine, snapshots);
            (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
            Wire = new QmpWire(ours, _server.Serve(theirs));
            Wire.ReadLine();
            Wire.Return("qmp_capabilities");
        }

        internal TestVm Vm { get; }

        internal QmpWire Wire { get; }

        internal void Until(string last, List<string> events)
        {
            while (events.Count == 0 || events[^1] != last)
            {
                events.Add(QmpWire.Describe(Wire.Read()));
                if (last != events[^1] && events[^1] is "MIGRATION completed" or "MIGRATION failed" or "MIGRATION cancelled") Assert.Fail(string.Join(", ", events));
            }
        }

        public void Dispose()
        {
            Wire.Dispose();
            Vm.Dispose();
            _server.Dispose();
        }
    }
}
