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
    private const ulong Size = XbzrleMove.SizeBytes;
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

    /// <summary>
    /// Pages change in the first pass, so the second one puts them into QEMU's cache, and again in pre-switchover, so the last one sends deltas. A QEMU without
    /// a CPU takes no writes from outside; a reset writes its ROM images again, and their pages are then dirty.
    /// </summary>
    [Test]
    public async Task QemuToVmm([Values("7.2", "10.0", "11.1")] string version)
    {
        using var content = new TempDirectory();
        byte[] ram = new byte[Size], image = new byte[16];
        new Random(2).NextBytes(ram.AsSpan(0, 16 * 4096));
        new Random(3).NextBytes(image);
        File.WriteAllBytes(content["ram"], ram);
        File.WriteAllBytes(content["image"], image);
        string[] images = [.. Enumerable.Range(0, Pages).SelectMany(page => (string[])["-device", $"loader,file={content["image"]},force-raw=on,addr=0x{ImageAt(page):x}"])];
        using var qemu = QemuProcess.WithRamFile(version, Size, content["ram"], ["-S", .. images]);
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        foreach (string capability in (string[])["return-path", "xbzrle", "pause-before-switchover"]) qemu.SetCapability(capability, true);
        qemu.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 100_000, ["downtime-limit"] = 1 });
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        LeakCheck.WaitFor(() => qemu.Run("query-migrate")!["ram"]?["normal"]?.GetValue<long>() >= Pages, "QEMU has sent the pages that change");
        Change(qemu, content["ram"], image, 1);
        // QEMU 10.0 skips the second pass when the first one takes less than 100 ms.
        LeakCheck.WaitFor(() => qemu.Run("query-migrate")!["ram"]?["dirty-sync-count"]?.GetValue<long>() >= 2, "QEMU begins its second pass");
        qemu.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 2_000_000 });
        LeakCheck.WaitFor(() => qemu.Run("query-migrate")!["status"]!.ToString() == "pre-switchover", "QEMU reaches pre-switchover");
        Change(qemu, content["ram"], image, 2);
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
        string theirs = qemu.Run("human-monitor-command", new JsonObject { ["command-line"] = "info migrate -a" })!.ToString().ReplaceLineEndings("\n");
        string text = HumanText.Migrate(info, all: true, onlyMigratable: false);
        Assert.That(theirs, Does.Contain(text[text.IndexOf("XBZRLE", StringComparison.Ordinal)..]));
    }

    private static int ImageAt(int page) => (page * 4096) + (page * 300);

    /// <summary>Changes bytes of each page and makes QEMU write the page's image again.</summary>
    private static void Change(QemuProcess qemu, string path, byte[] image, byte value)
    {
        using Microsoft.Win32.SafeHandles.SafeFileHandle file = File.OpenHandle(path, access: FileAccess.ReadWrite, share: FileShare.ReadWrite);
        for (int page = 0; page < Pages; page++) RandomAccess.Write(file, [value, 0, value, 0, 0, value], ImageAt(page) + 12);
        qemu.Run("system_reset");
        byte[] now = new byte[image.Length];
        LeakCheck.WaitFor(() => Enumerable.Range(0, Pages).All(page => RandomAccess.Read(file, now, ImageAt(page)) == now.Length && now.AsSpan().SequenceEqual(image)), "QEMU writes its images");
    }
}
