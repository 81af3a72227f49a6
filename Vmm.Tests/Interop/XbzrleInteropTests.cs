using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;
using Vmm.Migration.Channels;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>Deltas to and from real QEMUs, while RAM changes.</summary>
[TestFixture, Category(QemuVersions.Category)]
public class XbzrleInteropTests
{
    private const ulong Size = 4 << 20;
    private const int Pages = 8;

    [Test]
    public async Task VmmToQemu([Values("7.2", "10.0", "11.1")] string version)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        vm.Vm.Cont();
        using var writer = new BackgroundWriter(vm);
        Task<MigrationStatus> outgoing = XbzrleMove.Begin(vm, qemu.Listen("tcp:127.0.0.1:0"));
        XbzrleMove.FinishAfterDeltas(vm);
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        writer.Dispose();
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
        Assert.That(vm.Engine.Query().Xbzrle!.Bytes, Is.GreaterThan(0));
    }

    /// <summary>Pages change in the first pass, so the second one puts them into QEMU's cache, and again in pre-switchover, so the last one sends deltas.</summary>
    [Test]
    public async Task QemuToVmm([Values("7.2", "10.0", "11.1")] string version)
    {
        using var content = new TempDirectory();
        byte[] ram = new byte[Size];
        new Random(2).NextBytes(ram.AsSpan(0, 16 * 4096));
        File.WriteAllBytes(content["ram"], ram);
        string[] machine = ["-M", "none,memory-backend=m", "-m", $"{Size >> 20}", "-object", $"memory-backend-file,id=m,size={Size},mem-path={content["ram"]},share=on", "-cpu", "qemu64,-apic,apic-id=0"];
        using var qemu = QemuProcess.WithMachine(version, machine, "-S", "-qtest", $"unix:{content["qtest"]},server=on,wait=off", "-qtest-log", "none");
        using var test = new QTest(content["qtest"]);
        qemu.SaveByExec(content["stream"]);
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        CpuSections.Accept(vm, File.ReadAllBytes(content["stream"]));
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        foreach (string capability in (string[])["return-path", "xbzrle", "pause-before-switchover"]) qemu.SetCapability(capability, true);
        qemu.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 100_000, ["downtime-limit"] = 1 });
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        LeakCheck.WaitFor(() => qemu.Run("query-migrate")!["ram"]?["normal"]?.GetValue<long>() >= Pages, "QEMU has sent the pages that change");
        for (int page = 0; page < Pages; page++) test.Write((page * 4096) + 100, [(byte)(page + 1)]);
        qemu.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 1L << 30 });
        LeakCheck.WaitFor(() => qemu.Run("query-migrate")!["status"]!.ToString() == "pre-switchover", "QEMU reaches pre-switchover");
        for (int page = 0; page < Pages; page++) test.Write((page * 4096) + 4095 - (page * 300), [0xaa, 0, (byte)page]);
        qemu.Run("migrate-continue", new JsonObject { ["state"] = "pre-switchover" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        JsonNode stats = qemu.Run("query-migrate")!["xbzrle-cache"]!;
        Assert.That(stats["pages"]!.GetValue<long>() - stats["overflow"]!.GetValue<long>(), Is.GreaterThanOrEqualTo(Pages), stats.ToJsonString());
        if (version == "11.1") AssertSameFigures(qemu, stats);
        Assert.That(File.ReadAllBytes(content["ram"]).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
    }

    /// <summary>We show the same figures as QEMU does, in both monitors.</summary>
    private static void AssertSameFigures(QemuProcess qemu, JsonNode stats)
    {
        var info = new MigrationInfo
        {
            Status = MigrationStatus.Completed, Ram = new RamStats(), Xbzrle = new XbzrleStats
            {
                CacheSizeBytes = stats["cache-size"]!.GetValue<ulong>(), Bytes = stats["bytes"]!.GetValue<long>(), Pages = stats["pages"]!.GetValue<long>(),
                CacheMisses = stats["cache-miss"]!.GetValue<long>(), CacheMissRate = stats["cache-miss-rate"]!.GetValue<double>(),
                EncodingRate = stats["encoding-rate"]!.GetValue<double>(), Overflows = stats["overflow"]!.GetValue<long>(),
            },
        };
        JsonNode ours = JsonNode.Parse(QmpMigrationInfo.ToJson(info)["xbzrle-cache"]!.ToJsonString())!;
        Assert.That(ours.AsObject().Select(static m => m.Key), Is.EquivalentTo(stats.AsObject().Select(static m => m.Key)));
        foreach ((string name, JsonNode? value) in ours.AsObject()) Assert.That(value!.GetValue<double>(), Is.EqualTo(stats[name]!.GetValue<double>()), name);
        string theirs = qemu.Run("human-monitor-command", new JsonObject { ["command-line"] = "info migrate" })!.ToString().ReplaceLineEndings("\n");
        string text = HumanText.Migrate(info, all: false, onlyMigratable: false);
        Assert.That(theirs, Does.Contain(text[text.IndexOf("XBZRLE", StringComparison.Ordinal)..]));
    }

    /// <summary>QEMU's qtest protocol, which writes guest memory and marks it dirty.</summary>
    private sealed class QTest : IDisposable
    {
        private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);

        internal QTest(string path) => _socket.Connect(new UnixDomainSocketEndPoint(path));

        internal void Write(int address, byte[] bytes)
        {
            _socket.Send(Encoding.ASCII.GetBytes($"write 0x{address:x} 0x{bytes.Length:x} 0x{Convert.ToHexStringLower(bytes)}\n"));
            byte[] answer = new byte[64];
            Assert.That(Encoding.ASCII.GetString(answer, 0, _socket.Receive(answer)), Is.EqualTo("OK\n"));
        }

        public void Dispose() => _socket.Dispose();
    }
}
