using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Workloads;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>The deterministic workload migrates while it writes; its own checks report a page that was lost or torn.</summary>
[TestFixture, Category(QemuVersions.Category)]
public class WorkloadInteropTests
{
    private const ulong Size = 32 << 20;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [Test]
    public async Task ABusyGuestSurvivesTenMovesInARow()
    {
        TestVm vm = Guest(incoming: false);
        vm.Vm.Cont();
        for (int hop = 0; hop < 10; hop++)
        {
            long before = Workload(vm).Writes;
            LeakCheck.WaitFor(() => Workload(vm).Writes > before, "the guest writes");
            TestVm next = Guest(incoming: true);
            vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
            Task<MigrationStatus> incoming = next.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
            MigrationStatus sent = await vm.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{next.Engine.Query().SocketAddresses[0].Port}")).WaitAsync(s_deadline);
            Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), () => $"hop {hop}: {vm.Engine.Query().Error}");
            Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
            Assert.That((vm.Vm.RunState.State, next.Vm.RunState.State), Is.EqualTo((RunState.PostMigrate, RunState.Running)));
            vm.Dispose();
            vm = next;
        }
        AssertClean(vm);
        vm.Dispose();
    }

    [Test]
    public async Task ABusyGuestPassesThroughQemuAndBack([Values("7.2", "10.0", "11.1")] string version)
    {
        using TestVm source = Guest(incoming: false);
        source.Vm.Cont();
        LeakCheck.WaitFor(() => Workload(source).Writes > 1000, "the guest writes");
        using var qemu = new QemuProcess(version, Size, "m", "-incoming", "defer");
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        MigrationStatus sent = await source.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(s_deadline);
        Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
        using TestVm destination = Guest(incoming: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.SetCapability("return-path", true);
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That(destination.Vm.RunState.State, Is.EqualTo(RunState.Running));
        long before = Workload(destination).Writes;
        LeakCheck.WaitFor(() => Workload(destination).Writes > before + 1000, "the guest goes on");
        AssertClean(destination);
    }

    private static IWorkload Workload(TestVm vm) => vm.Vm.Devices.OfType<IWorkload>().Single();

    private static void AssertClean(TestVm vm)
    {
        WorkloadReport report = Workload(vm).Verify(CancellationToken.None);
        Assert.That(report.PagesChecked, Is.GreaterThan(1000));
        Assert.That(report.BadPages, Is.Zero, () => $"{report.FirstBad}");
        Assert.That(Workload(vm).Violations, Is.Zero, () => $"{Workload(vm).FirstViolation}");
    }

    private static TestVm Guest(bool incoming) => new(
        new VmOptions
        {
            IsIncoming = incoming, Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size }], Devices = [DeviceOptions.Parse($"pattern,rate=50M,seed=7,expect={(incoming ? "on" : "off")}")],
        },
        static b => b.AddPlugin<WorkloadPlugin>());
}
