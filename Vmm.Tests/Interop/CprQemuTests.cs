using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>cpr-transfer hands RAM over between QEMU 11.1 and vmm: the memfd travels and no page is copied (vfio-migration 7.4).</summary>
[TestFixture, Category(QemuVersions.Category)]
public class CprQemuTests
{
    private const string Version = "11.1";
    private const ulong Size = 16 << 20;
    private const int MaxStreamBytes = 8 << 10;

    private static string[] Machine => ["-M", "none,memory-backend=m,aux-ram-share=on", "-m", "16", "-object", $"memory-backend-memfd,id=m,size={Size},share=on"];

    /// <summary>With multifd, QEMU opens the channels in CPR too but sends no data on them.</summary>
    private static string[] Multifd(bool on) => on ? ["-global", "migration.x-multifd=on"] : [];

    [TestCase(true, false)]
    [TestCase(false, false)]
    [TestCase(true, true)]
    public async Task VmmHandsItsRamToQemu(bool returnPath, bool multifd)
    {
        using var folder = new TempDirectory();
        string main = folder["main"], cpr = folder["cpr"];
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath), new(MigrationCapability.Multifd, multifd)]);
        vm.Engine.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        // QEMU creates its monitor only after it has received the descriptors, so its start runs in a task.
        Task<QemuProcess> starting = Task.Run(() => QemuProcess.WithMachine(Version, [.. Machine, .. Multifd(multifd)], "-S", "-incoming", $"unix:{main}", "-incoming", MigrationChannelArgument.Unix("cpr", cpr)));
        Assert.That(SpinWait.SpinUntil(() => File.Exists(cpr) || starting.IsFaulted, QemuProcess.Deadline));
        Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse($"unix:{main}"), MigrationAddress.Parse($"unix:{cpr}"));
        using QemuProcess qemu = await starting.WaitAsync(QemuProcess.Deadline);
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(MemFds(qemu.ProcessId), Does.Contain(Inode(vm.Ram.Fd)), "QEMU maps the same memfd");
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
        RamStats ram = vm.Engine.Query().Ram!;
        Assert.That(ram.TransferredBytes, Is.LessThan(MaxStreamBytes));
        Assert.That(ram.NormalPages + ram.DuplicatePages, Is.Zero);
    }

    [TestCase(false)]
    [TestCase(true)]
    public async Task QemuHandsItsRamToVmm(bool multifd)
    {
        using var folder = new TempDirectory();
        string main = folder["main"], cpr = folder["cpr"], image = folder["image"];
        using TestVm pattern = TestVm.WithRam(Size).FilledRandom(3);
        using QemuProcess qemu = QemuProcess.WithMachine(Version, Machine, "-incoming", "defer");
        Task<MigrationStatus> filled = pattern.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")));
        Assert.That(await filled.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        qemu.WaitMigrated();
        byte[] expected = qemu.DumpMemory(Size);
        if (multifd) qemu.Run("migrate-set-capabilities", new JsonObject { ["capabilities"] = new JsonArray(new JsonObject { ["capability"] = "multifd", ["state"] = true }) });
        ulong[] theirs = MemFds(qemu.ProcessId);

        qemu.Run("migrate-set-parameters", new JsonObject { ["mode"] = "cpr-transfer" });
        Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(MigrationAddress.Parse($"unix:{cpr}"), CancellationToken.None));
        Assert.That(SpinWait.SpinUntil(() => File.Exists(cpr), QemuProcess.Deadline));
        qemu.Run("migrate", new JsonObject { ["channels"] = new JsonArray(JsonNode.Parse(MigrationChannelArgument.Unix("main", main)), JsonNode.Parse(MigrationChannelArgument.Unix("cpr", cpr))) });
        using CprTransferReceiver receiver = await receiving.WaitAsync(QemuProcess.Deadline);
        using var vm = new TestVm(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size }], IsIncoming = true, Cpr = receiver.Incoming });
        vm.Engine.SetCapabilities([new(MigrationCapability.Multifd, multifd)]);
        Assert.That(vm.Vm.CprFds.IsIncoming);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse($"unix:{main}"));
        receiver.Dispose();
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(theirs, Does.Contain(Inode(vm.Ram.Fd)), "vmm maps the same memfd");
        Assert.That(vm.Ram.ReadOnlySlice(0, (int)Size).SequenceEqual(expected), "RAM differs");
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.PreLaunch).Or.EqualTo(RunState.Running));
        Assert.That(vm.Vm.CprFds.IsIncoming, Is.False);
        Assert.That(image, Does.Not.Exist);
    }

    private static ulong Inode(OwnedFd fd)
    {
        Posix.Stat(fd, out FileStatus stat);
        return stat.Inode;
    }

    /// <summary>Inodes of the memfds that a process maps, read from /proc.</summary>
    private static ulong[] MemFds(int pid) =>
    [
        .. File.ReadAllLines($"/proc/{pid}/maps").Where(static l => l.Contains("/memfd:", StringComparison.Ordinal))
            .Select(static l => ulong.Parse(l.Split(' ', StringSplitOptions.RemoveEmptyEntries)[4], CultureInfo.InvariantCulture)).Distinct(),
    ];
}
