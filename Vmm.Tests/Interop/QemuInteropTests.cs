using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>Migration to and from real QEMUs over every transport, with and without a return path.</summary>
[TestFixture, Category(QemuVersions.Category)]
public class QemuInteropTests
{
    private const ulong Size = 16 << 20;

    private static IEnumerable<TestCaseData> Transports(bool toQemu)
    {
        foreach (string version in QemuVersions.All)
        {
            foreach (string transport in (string[])["tcp", "unix", "exec", "fd", "file"])
            {
                if (transport == "file" && version == "7.2") continue; // QEMU has file: since 8.2.
                yield return new TestCaseData(version, transport, false);
                if (transport is "tcp" or "unix" or "fd") yield return new TestCaseData(version, transport, true);
            }
        }
    }

    private static IEnumerable<TestCaseData> ToQemu() => Transports(true);

    private static IEnumerable<TestCaseData> FromQemu() => Transports(false);

    [TestCaseSource(nameof(ToQemu))]
    public async Task VmmToQemu(string version, string transport, bool returnPath)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(1, halfZero: true);
        if (returnPath) vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        Task<MigrationStatus> outgoing;
        string file = qemu.File("stream");
        switch (transport)
        {
            case "exec" or "file":
                outgoing = vm.Engine.Migrate(MigrationAddress.Parse(transport == "exec" ? $"exec:cat > {file}" : $"file:{file},offset=4096"));
                Assert.That(await outgoing, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
                qemu.Listen(transport == "exec" ? $"exec:cat {file}" : $"file:{file},offset=4096");
                break;
            case "fd":
                (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
                using (theirs) await qemu.Qmp.ExecuteAsync("getfd", new JsonObject { ["fdname"] = "mig" }, theirs);
                qemu.Run("migrate-incoming", new JsonObject { ["uri"] = "fd:mig" });
                using (ours) outgoing = vm.Engine.Migrate(MigrationAddress.Parse($"fd:{ours.Number}"));
                break;
            default:
                outgoing = vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen(transport == "tcp" ? "tcp:127.0.0.1:0" : $"unix:{qemu.File("mig")}")));
                break;
        }
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
        Assert.That(qemu.Run("query-status")!["status"]!.ToString(), Is.EqualTo("prelaunch"), "the destination takes over the source's run state");
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.PostMigrate));
    }

    [TestCaseSource(nameof(FromQemu))]
    public async Task QemuToVmm(string version, string transport, bool returnPath)
    {
        using TestVm pattern = TestVm.WithRam(Size).FilledRandom(2, halfZero: true);
        using var content = new TempDirectory();
        File.WriteAllBytes(content["ram"], pattern.Ram.ReadOnlySlice(0, (int)Size).ToArray());
        using var qemu = QemuProcess.WithRamFile(version, Size, content["ram"], "-S");
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        if (returnPath) qemu.SetCapability("return-path", true);
        Task<MigrationStatus> incoming;
        string file = qemu.File("stream");
        switch (transport)
        {
            case "exec" or "file":
                if (transport == "exec") qemu.SaveByExec(file);
                else qemu.Run("migrate", new JsonObject { ["uri"] = $"file:{file},offset=4096" });
                Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
                incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse(transport == "exec" ? $"exec:cat {file}" : $"file:{file},offset=4096"));
                break;
            case "fd":
                (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
                using (ours) incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse($"fd:{ours.Number}"));
                using (theirs) await qemu.Qmp.ExecuteAsync("getfd", new JsonObject { ["fdname"] = "mig" }, theirs);
                qemu.Run("migrate", new JsonObject { ["uri"] = "fd:mig" });
                break;
            default:
                incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse(transport == "tcp" ? "tcp:127.0.0.1:0" : $"unix:{qemu.File("mig")}"));
                MigrationAddress address = vm.Engine.Query().SocketAddresses[0];
                qemu.Run("migrate", new JsonObject { ["uri"] = transport == "tcp" ? $"tcp:127.0.0.1:{address.Port}" : $"unix:{address.Path}" });
                break;
        }
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        RamAssert.AreEqual(pattern.Vm.Memory, vm.Vm.Memory);
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.PreLaunch));
    }

    [Test]
    public async Task BlockSizesAndNames([Values("7.2", "10.0", "11.1")] string version, [Values(1, 300)] int megabytes, [Values("ram", "m")] string block)
    {
        ulong size = (ulong)megabytes << 20;
        using var qemu = new QemuProcess(version, size, block, "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(size, block).FilledRandom(3, halfZero: true);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
        Assert.That(qemu.DumpMemory(size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)size)), "RAM differs");
    }

    [Test, Category("slow")]
    public async Task FourGigabytesThereAndBack([Values("7.2", "11.1")] string version)
    {
        const ulong size = 4UL << 30;
        using TestVm vm = TestVm.WithRam(size);
        for (ulong at = 0; at < size; at += 64 << 20) new Random((int)(at >> 20)).NextBytes(vm.Ram.Slice(at, 1 << 20));
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        vm.Engine.Parameters = vm.Engine.Parameters with { MaxBandwidthBytesPerSecond = 0 };
        using var qemu = new QemuProcess(version, size, "m", "-S", "-incoming", "defer");
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
        using TestVm back = TestVm.WithRam(size, incoming: true);
        Task<MigrationStatus> incoming = back.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 100L << 30 });
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{back.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(vm.Vm.Memory, back.Vm.Memory);
    }

    [Test]
    public async Task RunningQemuContinuesHere([Values("7.2", "10.0", "11.1")] string version)
    {
        using var qemu = new QemuProcess(version, Size);
        using TestVm vm = TestVm.WithRam(Size, incoming: true);
        qemu.SetCapability("return-path", true);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(vm.Vm.Clock.NowNs, Is.GreaterThan(0), "the virtual clock goes on from QEMU's");
        // QEMU reports the migration as completed before it changes its run state.
        LeakCheck.WaitFor(() => qemu.Run("query-status")!["status"]!.ToString() == "postmigrate", "QEMU reaches postmigrate");
    }

    [Test]
    public async Task RunningVmmContinuesInQemu([Values("7.2", "10.0", "11.1")] string version)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size).FilledRandom(4);
        vm.Vm.Cont();
        using var writer = new BackgroundWriter(vm);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")));
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"));
        Assert.That(qemu.Run("query-status")!["status"]!.ToString(), Is.EqualTo("running"));
        Assert.That(writer.Writes, Is.GreaterThan(0), "RAM was dirtied");
        Assert.That(qemu.DumpMemory(Size).AsSpan().SequenceEqual(vm.Ram.ReadOnlySlice(0, (int)Size)), "RAM differs");
    }

    [Test]
    public async Task RamSizeMismatchIsNamedOnOurSide([Values("7.2", "11.1")] string version)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-S");
        using TestVm vm = TestVm.WithRam(Size * 2, incoming: true);
        qemu.SetCapability("return-path", true);
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{vm.Engine.Query().Error}", Does.Contain("'m': size differs, 0x2000000 here, 0x1000000 in the stream"));
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("failed"), "QEMU understands our SHUT with an error");
        // QEMU 7.2 may already be in postmigrate when it reads our SHUT; 11.1 waits for SHUT first.
        if (version == "11.1") Assert.That(qemu.Run("query-status")!["status"]!.ToString(), Is.EqualTo("prelaunch"));
    }

    [Test]
    public async Task SourceRunsOnWhenQemuRefuses([Values("7.2", "11.1")] string version, [Values] bool returnPath)
    {
        using var qemu = new QemuProcess(version, Size, "m", "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(Size * 2).FilledRandom(5);
        vm.Vm.Cont();
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath)]);
        Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")));
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That($"{vm.Engine.Query().Error}", Does.StartWith("source, "));
    }

    [Test]
    public async Task SourceRunsOnWhenQemuIsKilled([Values("7.2", "11.1")] string version, [Values] bool returnPath)
    {
        using var qemu = new QemuProcess(version, 64 << 20, "m", "-S", "-incoming", "defer");
        using TestVm vm = TestVm.WithRam(64 << 20).FilledRandom(6);
        vm.Vm.Cont();
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath)]);
        vm.Engine.Parameters = vm.Engine.Parameters with { MaxBandwidthBytesPerSecond = 40 << 20 };
        Task<MigrationStatus> outgoing = vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0")));
        Assert.That(() => vm.Engine.Query().Ram?.NormalPages ?? 0, Is.GreaterThan(1000).After(10_000, 5));
        qemu.Kill();
        var clock = System.Diagnostics.Stopwatch.StartNew();
        Assert.That(await outgoing.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(1)));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public void QemuScriptReadsOurFile()
    {
        string script = Path.Combine(QemuVersions.Folder("VMM_QEMU_SCRIPTS"), "analyze-migration.py");
        using var folder = new TempDirectory();
        using TestVm vm = TestVm.WithRam(1 << 20).Filled(Golden.RamA());
        Assert.That(vm.Engine.Migrate(MigrationAddress.Parse($"file:{folder["s"]}")).Result, Is.EqualTo(MigrationStatus.Completed));
        (int status, string output, string errors) = Shell.Run("python3", script, "-d", "state", "-f", folder["s"]);
        Assert.That(status, Is.Zero, errors);
        JsonNode state = JsonNode.Parse(output)!;
        Assert.That(state["globalstate (3)"]!["runstate"]!.ToString(), Does.StartWith("70 72 65 6c"), output);
        (status, output, errors) = Shell.Run("python3", script, "-d", "desc", "-f", folder["s"]);
        Assert.That(status, Is.Zero, errors);
        Assert.That(JsonNode.Parse(output)!["devices"]!.AsArray(), Has.Count.EqualTo(2));
    }
}
