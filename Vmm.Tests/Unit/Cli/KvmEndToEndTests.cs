using System.Text.Json.Nodes;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Demo;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>A real guest in real processes.</summary>
[NonParallelizable]
internal sealed class KvmEndToEndTests : EndToEnd
{
    private const int SnapshotEvery = 3;

    [TestCase(3)]
    [TestCase(50, Category = "slow", Explicit = true)]
    public async Task A_guest_moves_from_process_to_process_and_through_snapshots_without_a_wrong_word(int hops)
    {
        KvmGuest.Require();
        using KvmGuest probe = KvmGuest.MemCheck();
        double ticksPerMs = probe.Kvm.CpuStates[0].TscKhz;
        PeerProcess at = await Start("vm0");
        double downtimeMs = 0;
        MemCheckGuest.Found found = await Past(at, 2);
        for (int hop = 1; hop <= hops; hop++)
        {
            PeerProcess to = await Start($"vm{hop}", "--incoming", "tcp:127.0.0.1:0");
            JsonNode result = JsonNode.Parse(await Vmm.Ok("migrate", "--vm", $"vm{hop - 1}", "--to", to.IncomingUri, "--json"))!;
            Assert.That(result["status"]!.ToString(), Is.EqualTo("completed"));
            downtimeMs = Math.Max(downtimeMs, (double)result["downtime"]!);
            await Vmm.Ok("quit", "--vm", $"vm{hop - 1}");
            at = to;
            found = await Past(at, found.Rounds + 2);
            // What the report and the guest have to agree on is in KvmMigrationTests: between processes the report also waits for the source's turn.
            if (found.MaxClockGapNs is { } ns) Assert.That(ns / 1e6, Is.EqualTo(found.MaxGapTicks / ticksPerMs).Within(2 + 0.05 * downtimeMs), $"hop {hop}: the guest's two clocks");
            if (hop % SnapshotEvery == 0) found = await ThroughSnapshot(at, $"vm{hop}", found);
        }
        TestContext.Out.WriteLine($"{hops} hops, {found.Rounds} rounds, longest downtime {downtimeMs:f1} ms, longest gap {found.MaxGapTicks / ticksPerMs:f1} ms by TSC, {found.MaxClockGapNs / 1e6:f1} ms by kvm-clock");
    }

    private async Task<MemCheckGuest.Found> ThroughSnapshot(PeerProcess at, string name, MemCheckGuest.Found found)
    {
        await Vmm.Ok("savevm", "one", "--vm", name);
        await Past(at, found.Rounds + 4);
        await Vmm.Ok("stop", "--vm", name);
        MemCheckGuest.Found later = await Read(at);
        await Vmm.Ok("loadvm", "one", "--vm", name);
        Assert.That((await Read(at)).Rounds, Is.LessThan(later.Rounds), "back in time, and still stopped");
        await Vmm.Ok("cont", "--vm", name);
        return await Past(at, later.Rounds + 1);
    }

    [Test]
    public async Task A_guest_drives_every_shipped_device_over_vfio_user_and_one_of_its_own()
    {
        KvmGuest.Require();
        string[] types = ["edu", "gpio-pci-idio-16", "sample", "dma-test,seed=1"];
        using VmmCommands.Running serve = Vmm.Start(["device", "serve", .. types.SelectMany((t, i) => (string[])["--type", t, "--socket", Vmm[$"device-{i}"]])]);
        await serve.Line($"at {Vmm[$"device-{types.Length - 1}"]}");
        PeerProcess vm = await Vmm.StartVmOf("vm", "4M,share=on", ["--accel", "kvm", "--kernel", "builtin:devcheck", "--device", $"serial,output={Vmm["serial"]}", "--device", "edu",
            .. types.SelectMany((_, i) => (string[])["--device", $"vfio-user-pci,id=dev{i},socket={Vmm[$"device-{i}"]}"])]);
        DateTime end = DateTime.UtcNow + KvmGuest.Deadline;
        while ((await vm.Monitor.Query("query-status", CancellationToken.None))["status"]!.ToString() != "shutdown" && DateTime.UtcNow < end)
        {
        }
        string file = Vmm["state"];
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = (long)DevCheckGuest.StateAddress, ["size"] = DevCheckGuest.StateBytes, ["filename"] = file }, CancellationToken.None);
        DevCheckGuest.Found found = DevCheckGuest.Found.Of(await File.ReadAllBytesAsync(file));
        Assert.That((found.Rounds, found.Devices, found.Broken, found.FirstBroken), Is.EqualTo((1ul, 5ul, 0ul, 0ul)), $"{found}");
        Assert.That(found.Held, Is.EqualTo(2 * 13 + 3 + 3 + 6), $"{found}");
        Assert.That(File.ReadAllText(Vmm["serial"]).Split('\n', StringSplitOptions.RemoveEmptyEntries).Order(),
            Is.EqualTo(new[] { "dma-test checked", "edu checked", "edu checked", "gpio-pci-idio-16 checked", "sample checked" }));
    }

    [Test]
    public async Task A_malformed_kernel_and_impossible_memory_are_refused_before_the_guest_runs()
    {
        KvmGuest.Require();
        string elf = Vmm["elf"];
        await File.WriteAllBytesAsync(elf, [0x7f, (byte)'E', (byte)'L', (byte)'F', 1, 2, 3]);
        CliResult cut = await Vmm.Run("run", "--kernel", elf), small = await Vmm.Run("run", "--kernel", "builtin:smp", "--memory", "1M"),
            large = await Vmm.Run("run", "--kernel", "builtin:smp", "--memory", "4G"), none = await Vmm.Run("run", "--kernel", "builtin:smp", "--accel", "none"),
            program = await Vmm.Run("run", "--accel", "kvm"), cpus = await Vmm.Run("run", "--kernel", "builtin:smp", "--cpus", "0");
        Assert.Multiple(() =>
        {
            Assert.That((cut.Code, cut.Error), Is.EqualTo((ExitCode.Usage, cut.Error)));
            Assert.That(cut.Error, Does.Contain("the ELF header is cut short"));
            Assert.That(small.Error, Does.Contain("at least 2 MiB"));
            Assert.That(large.Error, Does.Contain("at most 3 GiB"));
            Assert.That(none.Error, Does.Contain("without an accelerator"));
            Assert.That(program.Error, Does.Contain("--kernel"));
            Assert.That(cpus.Error, Does.Contain("1 to 64"));
        });
    }

    private Task<PeerProcess> Start(string name, params string[] arguments) =>
        Vmm.StartVmOf(name, "3M", ["--accel", "kvm", "--kernel", "builtin:memcheck", "--device", $"serial,output={Vmm["serial"]}", .. arguments]);

    /// <summary>Waits until the guest is past a round, and checks that it found nothing wrong.</summary>
    private async Task<MemCheckGuest.Found> Past(PeerProcess vm, ulong rounds)
    {
        DateTime end = DateTime.UtcNow + KvmGuest.Deadline;
        while (DateTime.UtcNow < end)
        {
            MemCheckGuest.Found found = await Read(vm);
            Assert.That((found.Errors, found.BackSteps), Is.EqualTo((0ul, 0ul)));
            if (found.Rounds > rounds) return found;
        }
        Assert.Fail($"the guest did not get past round {rounds}");
        return default;
    }

    private async Task<MemCheckGuest.Found> Read(PeerProcess vm)
    {
        string file = Vmm["state"];
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = (long)MemCheckGuest.StateAddress, ["size"] = MemCheckGuest.StateBytes, ["filename"] = file }, CancellationToken.None);
        return MemCheckGuest.Found.Of(await File.ReadAllBytesAsync(file));
    }
}
