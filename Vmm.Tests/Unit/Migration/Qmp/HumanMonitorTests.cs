using NUnit.Framework;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>The lines of the human monitor (qmp 10).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class HumanMonitorTests
{
    private static string Hmp(QmpWire wire, string line) =>
        wire.Return("human-monitor-command", $"{{\"command-line\":\"{line.Replace("\"", "\\\"", StringComparison.Ordinal)}\"}}").GetValue<string>();

    [TestCase("", "")]
    [TestCase("bogus", "unknown command: 'bogus'\r\n")]
    [TestCase("info bogus", "unknown command: 'info bogus'\r\n")]
    [TestCase("info status", "VM status: paused (prelaunch)\r\n")]
    [TestCase("info name", "vm1\r\n")]
    [TestCase("info migrate", "")]
    [TestCase("info snapshots", "There is no snapshot available.\r\n")]
    [TestCase("savevm a b", "savevm: extraneous characters at the end of line\r\nTry \"help savevm\" for more information\r\n")]
    [TestCase("loadvm", "loadvm: string expected\r\nTry \"help loadvm\" for more information\r\n")]
    [TestCase("loadvm zip", "Error: Snapshot 'zip' does not exist in one or more devices\r\n")]
    [TestCase("delvm nothing", "")]
    [TestCase("migrate -x tcp:h:1", "migrate: unsupported option -x\r\nTry \"help migrate\" for more information\r\n")]
    [TestCase("migrate -d bogus:1", "Error: unknown migration protocol: bogus:1 (hint: known: tcp:, unix:, fd:, exec:, file:)\r\n")]
    [TestCase("migrate_set_capability bogus on", "Error: invalid parameter value: bogus\r\n")]
    [TestCase("migrate_set_capability events maybe", "Expected 'on' or 'off'\r\nTry \"help migrate_set_capability\" for more information\r\n")]
    [TestCase("migrate_set_parameter bogus 1", "Error: invalid parameter value: bogus\r\n")]
    [TestCase("migrate_set_parameter max-bandwidth x", "Error: Invalid size x\r\n")]
    [TestCase("migrate_set_parameter downtime-limit 9999999", "Error: Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms\r\n")]
    [TestCase("i/b 0x60", "portb[0x0060] = 0xff\r\n")]
    [TestCase("i /h 0x60", "portw[0x0060] = 0xffff\r\n")]
    [TestCase("i 96", "portl[0x0060] = 0xffffffff\r\n")]
    [TestCase("i/b 0x70.3", "portb[0x0071] = 0xff\r\n")]
    [TestCase("i/b 0x70 3", "i: extraneous characters at the end of line\r\nTry \"help i\" for more information\r\n")]
    [TestCase("i", "unexpected end of expression\r\nTry \"help i\" for more information\r\n")]
    [TestCase("i/q 3", "invalid char in format: 'q'\r\nTry \"help i\" for more information\r\n")]
    [TestCase("i zz", "invalid char 'z' in expression\r\nTry \"help i\" for more information\r\n")]
    [TestCase("o/w 0xcf8 0x80000000", "")]
    [TestCase("migrate_continue pre-switchover", "Error: Migration not in expected state: none\r\n")]
    public void Lines_answer_as_QEMU_does(string line, string expected)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(Hmp(wire, line), Is.EqualTo(expected));
    }

    [Test]
    public void Without_a_store_snapshots_say_so()
    {
        using var host = new QmpHost(snapshots: false);
        using QmpWire wire = host.Client();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Hmp(wire, "savevm a"), Is.EqualTo("Error: no block device can store vmstate for snapshot\r\n"));
            Assert.That(Hmp(wire, "info snapshots"), Is.EqualTo("Error: no block device can store vmstate for snapshot\r\n"));
        }
    }

    [Test]
    public void Snapshots_are_saved_listed_loaded_and_deleted()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(Hmp(wire, "savevm snap1") + Hmp(wire, "savevm \"snap1\"") + Hmp(wire, "loadvm snap1"), Is.Empty);
        string date = DateTimeOffset.UnixEpoch.AddDays(1).LocalDateTime.ToString("yyyy-MM-dd HH:mm:ss", null);
        Assert.That(Hmp(wire, "info snapshots"), Is.EqualTo(
            "List of snapshots present on all disks:\r\n"
            + "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\r\n"
            + $"--      snap1             101 MiB {date}  0001:02:03.026         --\r\n"));
        Hmp(wire, "delvm snap1");
        Hmp(wire, "savevm");
        Assert.That(host.Snapshots.List().Single().Name, Does.Match("^vm-[0-9]{14}$"));
        Assert.That(host.Snapshots.Calls.Take(3), Is.EqualTo(new[] { "save snap1 True", "save snap1 True", "load snap1" }));
    }

    [Test]
    public void A_bare_number_is_MiB_for_bandwidth_and_suffixes_count()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Hmp(wire, "migrate_set_parameter max-bandwidth 10");
        Assert.That(host.Engine.Parameters.MaxBandwidthBytesPerSecond, Is.EqualTo(10UL << 20));
        Hmp(wire, "migrate_set_parameter max-bandwidth 3G");
        Assert.That(host.Engine.Parameters.MaxBandwidthBytesPerSecond, Is.EqualTo(3UL << 30));
        Hmp(wire, "migrate_set_parameter downtime-limit 20");
        Hmp(wire, "migrate_set_capability events on");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Hmp(wire, "info migrate_parameters"), Does.Contain("downtime-limit: 20 ms\r\n").And.Contain("max-bandwidth: 3221225472 bytes/second\r\n")
                .And.Contain("tls-creds: ''\r\n").And.Contain("direct-io: off\r\n"));
            Assert.That(Hmp(wire, "info migrate_capabilities"), Does.Contain("events: on\r\n").And.Contain("multifd: off\r\n"));
        }
    }

    [Test]
    public void Info_migrate_is_laid_out_as_QEMU_11_1_does()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Engine.Info = new MigrationInfo
        {
            TotalTimeMs = 1206, ExpectedDowntimeMs = 300, RemainingBytes = 243269632,
            Ram = new RamStats
            {
                TransferredBytes = 27316534, RemainingBytes = 241172480, TotalBytes = 268435456, NormalPages = 6656, Mbps = 168.10128, PagesPerSecond = 5120,
                DirtySyncCount = 1, PrecopyBytes = 27316330,
            },
        };
        host.Engine.Move(MigrationStatus.Active);
        string[] expected =
        [
            "Status: \t\tactive", "Time (ms): \t\ttotal=1206, setup=0, exp_down=300", "Remaining: \t\t232 MiB", "RAM info:",
            "  Throughput (Mbps): \t168.10", "  Sizes: \t\tpagesize=4 KiB, total=256 MiB", "  Transfers: \t\ttransferred=26.1 MiB, remain=230 MiB",
            "    Channels: \t\tprecopy=26.1 MiB, multifd=0 B, postcopy=0 B", "    Page Types: \tnormal=6656, zero=0", "  Page Rates (pps): \ttransfer=5120",
            "  Others: \t\tdirty_syncs=1", "",
        ];
        Assert.That(Hmp(wire, "info migrate").Split("\r\n"), Is.EqualTo(expected));
        host.Engine.Info = host.Engine.Info with { CpuThrottlePercent = 30 };
        Assert.That(Hmp(wire, "info migrate"), Does.EndWith("dirty_syncs=1\r\nCPU Throttle (%): 30\r\n"));
        host.Engine.Info = host.Engine.Info with { CpuThrottlePercent = null };
        Assert.That(Hmp(wire, "info migrate -a"), Does.StartWith("Status: \t\tactive\r\n").And.Contain("\r\nGlobals:\r\n"));
        host.Engine.Info = new MigrationInfo { Error = new MigrationError { Side = "source", Phase = "connect", Message = "refused" } };
        host.Engine.Move(MigrationStatus.Failed);
        Assert.That(Hmp(wire, "info migrate"), Is.EqualTo("Status: \t\tfailed (source, connect: refused)\r\n"));
    }

    [TestCase(0, "0 B")]
    [TestCase(999, "999 B")]
    [TestCase(1000, "0.977 KiB")]
    [TestCase(4096, "4 KiB")]
    [TestCase(243269632, "232 MiB")]
    [TestCase(27316534, "26.1 MiB")]
    [TestCase(long.MaxValue, "8 EiB")]
    public void Sizes_have_three_digits(long bytes, string expected) => Assert.That(HumanText.Size(bytes), Is.EqualTo(expected));

    [Test]
    public void Migrate_blocks_until_the_end_unless_detached()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(Hmp(wire, "migrate -d tcp:h:1"), Is.Empty);
        host.Engine.Move(MigrationStatus.Completed);
        wire.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"migrate tcp:h:2\"}}");
        Assert.That(() => host.Engine.Status, Is.EqualTo(MigrationStatus.Setup).After(20_000, 1));
        Assert.That(host.Engine.Calls, Has.Count.EqualTo(2));
        host.Engine.Info = new MigrationInfo { Error = new MigrationError { Side = "source", Phase = "connect", Message = "refused" } };
        host.Engine.Move(MigrationStatus.Failed);
        Assert.That(wire.Read()["return"]!.ToString(), Is.EqualTo("Error: source, connect: refused\r\n"));
    }
}
