using System.Text.Json.Nodes;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>Mapped-ram files to and from QEMU, which has them from 9.0 on (stream 5).</summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class MappedRamQemuTests
{
    private const ulong Size = 16 << 20;

    [Test]
    public async Task VmmToQemu([Values("10.0", "11.1")] string version, [Values("", ",offset=4096")] string offset, [Values] bool multifd)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        vm.Vm.Cont();
        using var writer = new BackgroundWriter(vm);
        vm.Engine.SetCapabilities([new(MigrationCapability.MappedRam, true)]);
        string uri = $"file:{qemu.File("m")}{offset}";
        Assert.That(await vm.Engine.Migrate(MigrationAddress.Parse(uri)).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        writer.Dispose();
        Assert.That(writer.Writes, Is.GreaterThan(0));
        qemu.SetCapability("mapped-ram", true);
        if (multifd) qemu.SetCapability("multifd", true);
        qemu.Listen(uri);
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
    }

    [Test]
    public async Task QemuToVmm([Values("10.0", "11.1")] string version, [Values("", ",offset=4096")] string offset, [Values] bool multifd)
    {
        using TestVm pattern = TestVm.WithRam(Size).FilledRandom(2, halfZero: true);
        using var content = new TempDirectory();
        File.WriteAllBytes(content["ram"], pattern.Ram.ReadOnlySlice(0, (int)Size).ToArray());
        using var qemu = QemuProcess.WithRamFile(version, Size, content["ram"], "-S");
        qemu.SetCapability("mapped-ram", true);
        if (multifd) qemu.SetCapability("multifd", true);
        string uri = $"file:{qemu.File("m")}{offset}";
        qemu.Run("migrate", new JsonObject { ["uri"] = uri });
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        vm.Engine.SetCapabilities([new(MigrationCapability.MappedRam, true)]);
        Assert.That(await vm.Engine.MigrateIncoming(MigrationAddress.Parse(uri)).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        RamAssert.AreEqual(pattern.Vm.Memory, vm.Vm.Memory);
    }
}
