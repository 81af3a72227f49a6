using System.Text.Json.Nodes;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;
using Vmm.Tools.Cli.Snapshots;

namespace Vmm.Tests.Unit.Cli;

internal sealed class FormatTests
{
    [TestCase(0, "0 B")]
    [TestCase(1023, "1023 B")]
    [TestCase(1024, "1 KiB")]
    [TestCase(1536, "1.5 KiB")]
    [TestCase(536870912, "512 MiB")]
    [TestCase(1610612736.0, "1.5 GiB")]
    [TestCase(1e18, "909495 TiB")]
    public void Sizes(double bytes, string text) => Assert.That(Format.Size(bytes), Is.EqualTo(text));

    [TestCase(0.123, "0.12 ms")]
    [TestCase(4.25, "4.25 ms")]
    [TestCase(999, "999 ms")]
    [TestCase(1250, "1.25 s")]
    [TestCase(125000, "2 min 5 s")]
    public void Times(double ms, string text) => Assert.That(Format.Milliseconds(ms), Is.EqualTo(text));

    [Test]
    public void A_table_aligns_its_columns_and_ends_no_line_with_blanks()
    {
        using var to = new StringWriter();
        Format.WriteTable(to, [["A", "LONG", "C"], ["aaa", "b", "c"], ["a", "b"]]);
        Assert.That(to.ToString(), Is.EqualTo("A    LONG  C\naaa  b     c\na    b\n"));
    }

    [Test]
    public void A_completed_migration_is_summed_up_with_rounds_throughput_and_the_parts_of_its_downtime()
    {
        var report = new MigrationReport((JsonObject)JsonNode.Parse($$$"""
            {"status": "completed", "total-time": 2010, "setup-time": 10, "downtime": 5,
             "ram": {"transferred": 1073741824, "total": 536870912, "remaining": 0, "normal": 262144, "duplicate": 7, "dirty-sync-count": 3, "mbps": 1.5},
             "{{{MigrationReport.DowntimeMember}}}": {"drain-ms": 1.5, "device-stop-ms": 0.25, "final-ram-ms": 2, "device-state-ms": 0, "send-ms": 0.5, "load-ms": 1, "start-ms": 0.75, "total-ms": 4.5}}
            """)!);
        Assert.That(string.Join('\n', report.Lines().Select(static l => string.Join(": ", l))), Is.EqualTo("""
            status: completed
            total time: 2.01 s
            rounds: 3
            transferred: 1 GiB of 512 MiB RAM (262144 pages, 7 zero pages)
            throughput: 512 MiB/s
            downtime: 4.5 ms (device stop 0.25 ms, final RAM 2 ms, send 0.5 ms, load 1 ms, start 0.75 ms; drain before it 1.5 ms)
            """));
    }

    [Test]
    public void A_listening_VM_shows_where()
    {
        var report = new MigrationReport((JsonObject)JsonNode.Parse(
            """{"status": "setup", "socket-address": [{"port": "38473", "ipv6": true, "host": "::1", "type": "inet"}, {"type": "unix", "path": "/a"}]}""")!);
        Assert.That(report.Lines().Select(static l => l[1]), Is.EqualTo(new[] { "setup", "tcp:[::1]:38473", "unix:/a" }));
    }

    [Test]
    public void Snapshot_rows_are_read_from_QEMUs_table() => Assert.Multiple(() =>
    {
        Assert.That(SnapshotRow.Parse("There is no snapshot available."), Is.Empty);
        Assert.That(SnapshotRow.Parse("""
            List of snapshots present on all disks:
            ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
            --      snap1             101 MiB 2026-11-21 00:04:50  0000:00:00.026         --
            """), Is.EqualTo(new[] { new SnapshotRow("snap1", "101 MiB", "2026-11-21 00:04:50", "0000:00:00.026") }));
    });
}
