using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Interop;

/// <summary>
/// cpr-transfer into a process that was started with <c>--incoming defer</c>: it takes the descriptors at once, and the source waits until the operator
/// has given the address of the main channel (vfio-migration 7.4). QEMU 11.1 does the same.
/// </summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class CprDeferTests
{
    private const ulong Size = 16 << 20;

    private static readonly string[] s_machine = ["-M", "none,memory-backend=m,aux-ram-share=on", "-m", "16", "-object", $"memory-backend-memfd,id=m,size={Size},share=on"];

    [Test]
    public async Task FromVmm([Values("unix:", "tcp:127.0.0.1:0")] string main)
    {
        await using var vmm = new VmmCommands();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(1);
        source.Engine.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        source.Vm.Cont();
        (Task<PeerProcess> starting, string cpr) = StartDeferred(vmm);
        // A port must be known to the source beforehand.
        string at = main == "unix:" ? $"unix:{vmm["main"]}" : $"tcp:127.0.0.1:{FreePort()}";
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse(at), MigrationAddress.Parse($"unix:{cpr}"));
        PeerProcess destination = await starting.WaitAsync(QemuProcess.Deadline);
        Assert.That((source.Engine.Status, outgoing.IsCompleted), Is.EqualTo((MigrationStatus.Setup, false)), "the source waits");
        Assert.That(source.Vm.RunState.IsRunning, "its guest runs meanwhile");
        await Execute(destination, "migrate-incoming", new JsonObject { ["uri"] = at });
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        await WaitCompleted(destination);
        Assert.That(MemFds(destination.Pid), Does.Contain(Inode(source.Ram.Fd)), "both map the same memfd");
        Assert.That(await vmm.State(destination), Is.EqualTo("running"));
    }

    [Test]
    public async Task FromQemu()
    {
        await using var vmm = new VmmCommands();
        using QemuProcess source = QemuProcess.WithMachine("11.1", s_machine);
        source.Run("migrate-set-parameters", new JsonObject { ["mode"] = "cpr-transfer" });
        (Task<PeerProcess> starting, string cpr) = StartDeferred(vmm);
        StartMigration(source, vmm["main"], cpr);
        PeerProcess destination = await starting.WaitAsync(QemuProcess.Deadline);
        ulong[] theirs = MemFds(source.ProcessId);
        await Execute(destination, "migrate-incoming", new JsonObject { ["uri"] = $"unix:{vmm["main"]}" });
        Assert.That(source.WaitMigrated(), Is.EqualTo("completed"), () => source.Errors);
        await WaitCompleted(destination);
        Assert.That(MemFds(destination.Pid).Intersect(theirs), Is.Not.Empty, "both map the same memfd");
    }

    /// <summary>The yardstick: what QEMU's destination does with the same commands.</summary>
    [Test]
    public async Task FromVmmIntoQemu()
    {
        using var folder = new TempDirectory();
        string main = folder["main"], cpr = folder["cpr"];
        using TestVm source = TestVm.WithRam(Size).FilledRandom(2);
        source.Engine.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        Task<QemuProcess> starting = Task.Run(() => QemuProcess.WithMachine("11.1", s_machine, "-S", "-incoming", "defer", "-incoming", MigrationChannelArgument.Unix("cpr", cpr)));
        LeakCheck.WaitFor(() => File.Exists(cpr) || starting.IsFaulted, "QEMU does not listen");
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"unix:{main}"), MigrationAddress.Parse($"unix:{cpr}"));
        using QemuProcess qemu = await starting.WaitAsync(QemuProcess.Deadline);
        Assert.That(source.Engine.Status, Is.EqualTo(MigrationStatus.Setup), "the source waits");
        qemu.Run("migrate-incoming", new JsonObject { ["uri"] = $"unix:{main}" });
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(source.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
    }

    /// <summary>Descriptors that came with an attempt belong to the source again after it has failed, so the new process ends.</summary>
    [Test]
    public async Task AFailureEndsTheNewProcessAndTheSourceRunsOn()
    {
        await using var vmm = new VmmCommands();
        using TestVm source = TestVm.WithRam(Size, "another").FilledRandom(3);
        source.Engine.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        source.Vm.Cont();
        string cpr = vmm["cpr"], main = $"unix:{vmm["main"]}";
        using VmmCommands.Running next = vmm.Start("run", "--name", "b", "--memory", "16M,id=m", "--accel", "none", "--incoming", "defer", "--incoming", MigrationChannelArgument.Unix("cpr", cpr));
        LeakCheck.WaitFor(() => File.Exists(cpr), "the new process does not listen");
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse(main), MigrationAddress.Parse($"unix:{cpr}"));
        await next.Line("ready:");
        using (var monitor = QmpClient.Connect(vmm["vmm/b.qmp"], QemuProcess.Deadline))
            monitor.Execute("migrate-incoming", new JsonObject { ["uri"] = main, ["exit-on-error"] = false }, QemuProcess.Deadline);
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        CliResult result = await next.Finish();
        Assert.That(result.Code, Is.EqualTo(Tools.Cli.Shell.ExitCode.Failed), result.Error);
        Assert.That(result.Error, Does.Contain("incoming migration failed").And.Contain("RAM block 'another'"));
        Assert.That(source.Vm.RunState.IsRunning);
    }

    private static (Task<PeerProcess> Starting, string Cpr) StartDeferred(VmmCommands vmm)
    {
        string cpr = vmm["cpr"];
        Task<PeerProcess> starting = vmm.StartVmOf("b", "16M,id=m", "--accel", "none", "--incoming", "defer", "--incoming", MigrationChannelArgument.Unix("cpr", cpr));
        LeakCheck.WaitFor(() => File.Exists(cpr) || starting.IsFaulted, "the new process does not listen");
        return (starting, cpr);
    }

    private static void StartMigration(QemuProcess source, string main, string cpr) => source.Run("migrate", new JsonObject
    {
        ["channels"] = new JsonArray(JsonNode.Parse(MigrationChannelArgument.Unix("main", main)), JsonNode.Parse(MigrationChannelArgument.Unix("cpr", cpr))),
    });

    private static async Task<JsonNode?> Execute(PeerProcess vm, string command, JsonObject? arguments = null) => await vm.Monitor.Execute(command, arguments, CancellationToken.None);

    private static async Task WaitCompleted(PeerProcess vm)
    {
        using var limit = new CancellationTokenSource(QemuProcess.Deadline);
        while (true)
        {
            string? status = (await Execute(vm, "query-migrate"))!["status"]?.ToString();
            if (status == "completed") return;
            Assert.That(status is "failed" || limit.IsCancellationRequested, Is.False, $"the destination is {status}");
        }
    }

    private static int FreePort()
    {
        using var listener = new System.Net.Sockets.TcpListener(System.Net.IPAddress.Loopback, 0);
        listener.Start();
        return ((System.Net.IPEndPoint)listener.LocalEndpoint).Port;
    }

    private static ulong Inode(OwnedFd fd)
    {
        Posix.Stat(fd, out FileStatus stat);
        return stat.Inode;
    }

    /// <summary>Inodes of the memfds that a process maps.</summary>
    private static ulong[] MemFds(int pid) =>
    [
        .. File.ReadAllLines($"/proc/{pid}/maps").Where(static l => l.Contains("/memfd:", StringComparison.Ordinal))
            .Select(static l => ulong.Parse(l.Split(' ', StringSplitOptions.RemoveEmptyEntries)[4], CultureInfo.InvariantCulture)).Distinct(),
    ];
}
