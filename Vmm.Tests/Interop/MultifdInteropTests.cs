using System.Text.Json.Nodes;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>Multifd with real QEMUs that send one SYNC per round (9.0 and later), in both directions (stream 4).</summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class MultifdInteropTests
{
    private const ulong Size = 16 << 20;

    [Test]
    public async Task VmmToQemu([Values("10.0", "11.1")] string version, [Values] bool returnPath)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        qemu.SetCapability("multifd", true);
        Use(vm, returnPath);
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
        Assert.That(vm.Engine.Query().Ram!.MultifdBytes, Is.GreaterThan((long)Size / 2));
    }

    [Test]
    public async Task QemuToVmm([Values("10.0", "11.1")] string version, [Values] bool returnPath, [Values("none", "legacy", "multifd")] string zeroPages)
    {
        using TestVm pattern = TestVm.WithRam(Size).FilledRandom(2, halfZero: true);
        using var content = new TempDirectory();
        File.WriteAllBytes(content["ram"], pattern.Ram.ReadOnlySlice(0, (int)Size).ToArray());
        using var qemu = QemuProcess.WithRamFile(version, Size, content["ram"], "-S");
        // RAM starts non-zero, so that the test fails when a load skips the pages that the source lists as zero.
        using TestVm vm = TestVm.WithRam(Size, incoming: true).FilledRandom(9);
        qemu.SetCapability("multifd", true);
        if (returnPath) qemu.SetCapability("return-path", true);
        qemu.Run("migrate-set-parameters", new JsonObject { ["zero-page-detection"] = zeroPages });
        Use(vm, returnPath: false);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        RamAssert.AreEqual(pattern.Vm.Memory, vm.Vm.Memory);
    }

    [Test]
    public async Task AnyNumberOfChannelsGoesToQemu([Values("10.0", "11.1")] string version, [Values(1, 3, 4, 8, 16, 64)] int channels) =>
        await ToQemu(version, new MigrationParameters { MultifdChannels = channels });

    [Test]
    public async Task AnyNumberOfChannelsComesFromQemu([Values("10.0", "11.1")] string version, [Values(1, 3, 4, 8, 16, 64)] int channels) =>
        await FromQemu(version, new MigrationParameters { MultifdChannels = channels });

    [Test]
    public async Task EveryCompressionGoesToQemu([Values("10.0", "11.1")] string version, [Values("zlib", "zstd")] string method, [Values(2, 4)] int channels) =>
        await ToQemu(version, new MigrationParameters { MultifdChannels = channels, MultifdCompression = method });

    [Test]
    public async Task EveryCompressionComesFromQemu([Values("10.0", "11.1")] string version, [Values("zlib", "zstd")] string method, [Values(2, 4)] int channels) =>
        await FromQemu(version, new MigrationParameters { MultifdChannels = channels, MultifdCompression = method });

    [Test]
    public async Task EveryWayToFindZeroPagesGoesToQemu([Values("10.0", "11.1")] string version, [Values] ZeroPageDetection detection) =>
        await ToQemu(version, new MigrationParameters { ZeroPageDetection = detection });

    [Test]
    public async Task ASyncAfterEachSectionGoesToQemu([Values("7.2", "10.0", "11.1")] string version, [Values(2, 4)] int channels) =>
        await ToQemu(version, new MigrationParameters { MultifdChannels = channels, MultifdFlushAfterEachSection = true },
            version == "7.2" ? [] : ["-global", "migration.multifd-flush-after-each-section=on"]);

    [Test]
    public async Task AnotherCompressionIsRefusedAndTheSourceRunsOn([Values("none", "zlib", "zstd")] string here)
    {
        using var qemu = new QemuProcess("11.1", Size, "m", "-S");
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        string there = here == "zstd" ? "zlib" : "zstd";
        qemu.SetCapability("multifd", true);
        qemu.SetCapability("return-path", true);
        qemu.Run("migrate-set-parameters", new JsonObject { ["multifd-compression"] = there, ["zero-page-detection"] = "none" });
        Use(vm, returnPath: false);
        vm.Engine.Parameters = vm.Engine.Parameters with { MultifdCompression = here };
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(vm.Engine.Query().Error!.Message, Does.Contain($"the source compresses pages by '{there}', this side expects '{here}'"));
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("failed"), () => qemu.Errors);
    }

    private static async Task ToQemu(string version, MigrationParameters parameters, string[]? extra = null)
    {
        using var qemu = new QemuProcess(version, Size, "m", ["-S", "-incoming", "defer", .. extra ?? []]);
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        qemu.SetCapability("multifd", true);
        Set(qemu, parameters);
        Use(vm, returnPath: true);
        vm.Engine.Parameters = parameters;
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
        RamStats ram = vm.Engine.Query().Ram!;
        Assert.That(ram.NormalPages + ram.DuplicatePages, Is.EqualTo((long)Size / 4096), "each page is counted once");
        if (parameters.ZeroPageDetection != ZeroPageDetection.None) Assert.That(ram.DuplicatePages, Is.EqualTo((long)Size / 8192));
    }

    private static async Task FromQemu(string version, MigrationParameters parameters)
    {
        using TestVm pattern = TestVm.WithRam(Size).FilledRandom(2, halfZero: true);
        using var content = new TempDirectory();
        File.WriteAllBytes(content["ram"], pattern.Ram.ReadOnlySlice(0, (int)Size).ToArray());
        using var qemu = QemuProcess.WithRamFile(version, Size, content["ram"], "-S");
        using TestVm vm = TestVm.WithRam(Size, incoming: true).FilledRandom(9);
        qemu.SetCapability("multifd", true);
        qemu.SetCapability("return-path", true);
        Set(qemu, parameters);
        Use(vm, returnPath: false);
        vm.Engine.Parameters = parameters;
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        RamAssert.AreEqual(pattern.Vm.Memory, vm.Vm.Memory);
    }

    private static void Set(QemuProcess qemu, MigrationParameters parameters) =>
        qemu.Run("migrate-set-parameters", new JsonObject { ["multifd-channels"] = parameters.MultifdChannels, ["multifd-compression"] = parameters.MultifdCompression });

    private static void Use(TestVm vm, bool returnPath) =>
        vm.Engine.SetCapabilities([new(MigrationCapability.Multifd, true), new(MigrationCapability.ReturnPath, returnPath)]);
}
