using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>
/// x-ignore-shared with QEMU 11.1: RAM that both sides have in one file is not sent (stream 1.2, 3.2). A template VM is saved so once, and started often
/// with a private mapping of its file.
/// </summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class IgnoreSharedQemuTests
{
    private const string Version = "11.1";
    private const ulong Size = 16 << 20;
    private const int MaxStreamBytes = 8 << 10;

    private TempDirectory _folder = null!;
    private byte[] _content = null!;

    private string Ram => _folder["ram"];

    [SetUp]
    public void MakeRam()
    {
        _folder = new TempDirectory();
        _content = new byte[Size];
        new Random(1).NextBytes(_content);
        File.WriteAllBytes(Ram, _content);
    }

    [TearDown]
    public void RemoveRam() => _folder.Dispose();

    [Test]
    public async Task VmmToQemu([Values] bool share)
    {
        using TestVm vm = Vm(share: true, incoming: false);
        using QemuProcess qemu = Qemu(share, "-S", "-incoming", "defer");
        qemu.SetCapability("x-ignore-shared", true);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(vm.Engine.Query().Ram!.TransferredBytes, Is.LessThan(MaxStreamBytes), "RAM is not sent");
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(_content), "RAM differs");
    }

    [Test]
    public async Task QemuToVmm([Values] bool share)
    {
        using QemuProcess qemu = Qemu(share: true);
        using TestVm vm = Vm(share, incoming: true);
        qemu.SetCapability("x-ignore-shared", true);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That((long)qemu.Run("query-migrate")!["ram"]!["transferred"]!, Is.LessThan(MaxStreamBytes), "RAM is not sent");
        Assert.That(vm.Ram.ReadOnlySlice(0, (int)Size).SequenceEqual(_content), "RAM differs");
    }

    /// <summary>One saved state starts clones in vmm and in QEMU; what a clone writes stays its own.</summary>
    [Test]
    public async Task ATemplateStartsClones([Values] bool fromQemu)
    {
        string state = _folder["state"];
        if (fromQemu)
        {
            using QemuProcess template = Qemu(share: true);
            template.SetCapability("x-ignore-shared", true);
            template.Run("migrate", new JsonObject { ["uri"] = $"file:{state}" });
            Assert.That(template.WaitMigrated(), Is.EqualTo("completed"), () => template.Errors);
        }
        else
        {
            using TestVm template = Vm(share: true, incoming: false);
            Assert.That(await template.Engine.Migrate(MigrationAddress.Parse($"file:{state}")).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        }
        Assert.That(new FileInfo(state).Length, Is.LessThan(MaxStreamBytes));
        for (int i = 0; i < 2; i++)
        {
            using TestVm clone = Vm(share: false, incoming: true);
            Assert.That(await clone.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{state}")).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{clone.Engine.Query().Error}");
            Assert.That(clone.Ram.ReadOnlySlice(0, (int)Size).SequenceEqual(_content), "RAM differs");
            clone.Ram.Slice(0, (int)Size).Clear();
        }
        using QemuProcess last = Qemu(share: false, "-S", "-incoming", "defer");
        last.SetCapability("x-ignore-shared", true);
        last.Run("migrate-incoming", new JsonObject { ["uri"] = $"file:{state}" });
        Assert.That(last.WaitMigrated(), Is.EqualTo("completed"), () => last.Errors);
        Assert.That(last.DumpMemory(Size).AsSpan().SequenceEqual(_content), "RAM differs");
    }

    /// <summary>QEMU and vmm refuse it alike.</summary>
    [Test]
    public async Task OnAtOneSideOnlyIsRefusedByName([Values] bool atSource)
    {
        using (QemuProcess qemu = Qemu(share: true))
        using (TestVm vm = Vm(share: true, incoming: true))
        {
            qemu.SetCapability("x-ignore-shared", atSource);
            vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, !atSource)]);
            Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
            qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
            Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
            MigrationError error = vm.Engine.Query().Error!;
            Assert.That(error.Message, Is.EqualTo(atSource ? "capability 'x-ignore-shared' is off here and on at the source" : "capability 'x-ignore-shared' is on here and off at the source"));
            Assert.That(error.Hint, Does.Contain("on both sides"));
        }
        using (TestVm vm = Vm(share: true, incoming: false))
        using (QemuProcess qemu = Qemu(share: true, "-S", "-incoming", "defer"))
        {
            vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, atSource), new(MigrationCapability.ReturnPath, true)]);
            qemu.SetCapability("x-ignore-shared", !atSource);
            qemu.Run("migrate-incoming", new JsonObject { ["uri"] = "tcp:127.0.0.1:0", ["exit-on-error"] = false });
            Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{qemu.Run("query-migrate")!["socket-address"]![0]!["port"]}"));
            Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
            Assert.That(qemu.WaitMigrated(), Is.EqualTo("failed"));
            Assert.That(qemu.Run("query-migrate")!["error-desc"]!.ToString(), Does.Contain("Failed to validate capabilities"));
        }
    }

    /// <summary>QEMU starts a clone on a file that it has just made, full of zeros, and says nothing. Shared RAM without file is a memfd, as every VM has: no case.</summary>
    [TestCase(false, false)]
    [TestCase(false, true)]
    [TestCase(true, true)]
    public async Task RamThatTheOtherSideDoesNotHaveIsRefused(bool share, bool file)
    {
        using QemuProcess qemu = Qemu(share: true);
        using var vm = new TestVm(new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size, IsShared = share, FilePath = file ? _folder["another"] : null }], IsIncoming = true,
        });
        qemu.SetCapability("x-ignore-shared", true);
        qemu.SetCapability("return-path", true);
        vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, true)]);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("failed"));
        MigrationError error = vm.Engine.Query().Error!;
        Assert.That(error.Message, Does.Contain("RAM block 'm': the source leaves it out").And.Contain(file ? "was made here and is empty" : "it has no file here"));
        Assert.That(error.Hint, Does.Contain("same file"));
        Assert.That(qemu.Run("query-status")!["status"]!.ToString(), Is.EqualTo("running"));
    }

    private TestVm Vm(bool share, bool incoming)
    {
        var vm = new TestVm(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size, FilePath = Ram, IsShared = share }], IsIncoming = incoming });
        vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, true)]);
        return vm;
    }

    private QemuProcess Qemu(bool share, params string[] extra) => QemuProcess.WithMachine(Version,
        ["-M", "none,memory-backend=m", "-m", $"{Size >> 20}", "-object", $"memory-backend-file,id=m,size={Size},mem-path={Ram},share={(share ? "on" : "off")}"], extra);
}
