using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tools.Cli.Shell;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Interop;

/// <summary>
/// Live migration over TCP between two <c>vmm run</c> processes, while their devices write to guest memory. Each process has its own
/// vfio-user device servers.
/// </summary>
[TestFixture, Category("interop")]
internal sealed class VfioUserMigrationTests : EndToEnd
{
    private const int SigKillNumber = 9, SigStopNumber = 19;

    [Test]
    public async Task ABusyDeviceArrivesWithItsStateAndEveryPageItWrote([Values("", ",precopy=off", ",p2p=on")] string options, [Values("", "64M", "64M socket to socket", "256M socket to socket")] string state)
    {
        string size = state.Length > 0 ? $",state-size={state.Split(' ')[0]}" : "";
        string more = state.Contains("socket", StringComparison.Ordinal) ? ",x-mig-chunk=1M" : "";
        VfioUserVm from = await VfioUserVm.StartWith(Vmm, "from", [$",seed=1{size}{options}"], more);
        VfioUserVm to = await VfioUserVm.StartWith(Vmm, "to", [$",seed=2{size}{options}"], more, "--incoming", "tcp:127.0.0.1:0");
        await from.SetUp();
        await from.StartDma(0);
        ulong checksum = await from.Read64(0, DmaTestRegisters.StateChecksum);
        await Migrate(from, to);
        Assert.That((await from.State(), await to.State()), Is.EqualTo(("postmigrate", "running")));
        await to.WaitForBlocks(0, 50);
        Assert.That((await to.Read32(0, DmaTestRegisters.Loads), await to.Read64(0, DmaTestRegisters.StateChecksum)), Is.EqualTo((1u, checksum)));
        await to.AssertMemory(0);
    }

    [Test]
    public async Task TheFinalStateGoesOverMultifdChannels([Values("", ",precopy=off")] string options)
    {
        string[] devices = [$",seed=1,state-size=32M,p2p=on{options}", $",seed=2,state-size=5M,p2p=on{options}"];
        const string on = ",x-migration-multifd-transfer=on";
        VfioUserVm from = await VfioUserVm.StartWith(Vmm, "from", devices, on);
        VfioUserVm to = await VfioUserVm.StartWith(Vmm, "to", [.. devices.Select(static d => d.Replace("seed=", "seed=7", StringComparison.Ordinal))], on, "--incoming", "tcp:127.0.0.1:0");
        await from.SetUp();
        var checksums = new ulong[2];
        for (int i = 0; i < 2; i++)
        {
            await from.StartDma(i, 10 << 20);
            checksums[i] = await from.Read64(i, DmaTestRegisters.StateChecksum);
        }
        foreach (VfioUserVm vm in (VfioUserVm[])[from, to]) await vm.Run("migrate-set-capabilities", Capability("multifd", true));
        await Migrate(from, to);
        for (int i = 0; i < 2; i++)
        {
            await to.WaitForBlocks(i, 20);
            Assert.That(await to.Read64(i, DmaTestRegisters.StateChecksum), Is.EqualTo(checksums[i]));
            await to.AssertMemory(i);
        }
        JsonNode ram = (await from.Run("query-migrate"))!["ram"]!;
        // A device without PRE_COPY sends its whole state after the stop, over the multifd channels.
        if (options.Length > 0) Assert.That((long)ram["multifd-bytes"]!, Is.GreaterThan(37L << 20));
        Assert.That((long)ram["multifd-bytes"]!, Is.Positive);
    }

    [Test]
    public async Task ThreeDevicesStopInTwoPhases()
    {
        string[] devices = [",seed=1,state-size=1M,p2p=on", ",seed=2,state-size=2M,p2p=on", ",seed=3,state-size=3M,p2p=on"];
        VfioUserVm from = await VfioUserVm.Start(Vmm, "from", devices);
        VfioUserVm to = await VfioUserVm.Start(Vmm, "to", [.. devices.Select(static d => d.Replace("seed=", "seed=7", StringComparison.Ordinal))], "--incoming", "tcp:127.0.0.1:0");
        await from.SetUp();
        var checksums = new ulong[3];
        for (int i = 0; i < 3; i++)
        {
            await from.StartDma(i, 10 << 20);
            checksums[i] = await from.Read64(i, DmaTestRegisters.StateChecksum);
        }
        // The VFIO_MIGRATION events of both sides show the order of states.
        using QmpTrace source = new(Vmm["vmm/from.qmp"]), destination = new(Vmm["vmm/to.qmp"]);
        await Migrate(from, to);
        for (int i = 0; i < 3; i++)
        {
            await to.WaitForBlocks(i, 20);
            Assert.That(await to.Read64(i, DmaTestRegisters.StateChecksum), Is.EqualTo(checksums[i]));
            await to.AssertMemory(i);
        }
        AssertPhases(await source.Wait("dev0 stop", "dev1 stop", "dev2 stop"), "pre-copy-p2p", "stop-copy");
        AssertPhases(await destination.Wait("dev0 running", "dev1 running", "dev2 running"), "running-p2p", "running");
    }

    [Test]
    public async Task CancelledAndRetriedThreeTimesInARow()
    {
        VfioUserVm from = await VfioUserVm.Start(Vmm, "from", [",seed=1,state-size=8M"]);
        VfioUserVm to = await VfioUserVm.Start(Vmm, "to", [",seed=2,state-size=8M"], "--incoming", "tcp:127.0.0.1:0");
        await from.SetUp();
        await from.StartDma(0);
        ulong checksum = await from.Read64(0, DmaTestRegisters.StateChecksum);
        await from.Run("migrate-set-capabilities", Capability("pause-before-switchover", true));
        for (int i = 0; i < 3; i++)
        {
            await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
            // The first cancel comes in the middle of precopy, the others while the VM is stopped before the switchover.
            await from.WaitMigration(i == 0 ? "active" : "pre-switchover");
            await from.Run("migrate_cancel");
            Assert.That(await from.WaitMigration("cancelled", "completed", "failed"), Is.EqualTo("cancelled"));
            Assert.That((await from.State(), await to.State()), Is.EqualTo(("running", "inmigrate")));
            await from.WaitForBlocks(0, 20);
        }
        await from.Run("migrate-set-capabilities", Capability("pause-before-switchover", false));
        await Migrate(from, to);
        await to.WaitForBlocks(0, 20);
        Assert.That((await to.Read32(0, DmaTestRegisters.Loads), await to.Read64(0, DmaTestRegisters.StateChecksum)), Is.EqualTo((1u, checksum)));
        await to.AssertMemory(0);
    }

    public enum Moment
    {
        BeforeTheMigration,
        InPrecopy,
        BeforeTheSwitchover,
    }

    [Test]
    public async Task TheSourcesServerDies([Values] Moment moment)
    {
        VfioUserVm from = await VfioUserVm.Start(Vmm, "from", [",seed=1,state-size=8M"]);
        VfioUserVm to = await VfioUserVm.Start(Vmm, "to", [",seed=2,state-size=8M"], "--incoming", "tcp:127.0.0.1:0");
        await Prepare(from, moment);
        string reason;
        if (moment == Moment.BeforeTheMigration)
        {
            await Kill(from);
            await WaitLost(from, 0);
            reason = (await Assert.ThrowsAsync<MonitorException>(() => from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri })))!.Message;
        }
        else
        {
            await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
            await Reach(from, moment, () => Kill(from));
            Assert.That(await from.WaitMigration("failed", "completed"), Is.EqualTo("failed"));
            reason = (await from.Run("query-migrate"))!["error-desc"]!.ToString();
        }
        Assert.That(reason, Does.Match("device 'dev0'.* is gone").And.Contain("from-0.sock"), "the reason names the device");
        Assert.That(await to.State(), Is.EqualTo("inmigrate"), "the destination does not start");
        Assert.That(await from.State(), Is.EqualTo("running"), reason);
        Assert.That((await Vmm.Run("savevm", "s", "--vm", "from")).Code, Is.Not.EqualTo(ExitCode.Ok), "nobody has the device's state");
        Assert.That(await from.State(), Is.EqualTo("running"));
        Assert.That(await from.Read32(0, DmaTestRegisters.Id), Is.EqualTo(uint.MaxValue), "a device whose server is gone reads as all ones");
        // The operator's commands work, and a reset brings the device back once a server is there.
        await from.Run("stop");
        await from.Run("cont");
        Assert.That(await from.State(), Is.EqualTo("running"));
        VmmCommands.Running again = Vmm.Start("device", "serve", "--type", "dma-test,seed=3,state-size=8M", "--socket", Vmm["from-0.sock"]);
        await again.Line("serving dma-test");
        await from.Run("system_reset");
        Assert.That(await Lost(from, 0), Is.Null);
        await from.SetUp();
        await from.StartDma(0);
        await from.Run("migrate-set-capabilities", Capability("pause-before-switchover", false));
        await Migrate(from, to);
        await to.AssertMemory(0);
    }

    [Test]
    public async Task AFrozenServerDelaysTheOperatorOnlyForTheStatedTime([Values("stop", "quit", "SIGTERM", "migrate_cancel")] string what)
    {
        VfioUserVm from = await VfioUserVm.Start(Vmm, "from", [",seed=1,state-size=8M"]);
        VfioUserVm to = await VfioUserVm.Start(Vmm, "to", [",seed=2,state-size=8M"], "--incoming", "tcp:127.0.0.1:0");
        await Prepare(from, Moment.BeforeTheSwitchover);
        bool migrates = what == "migrate_cancel";
        if (migrates)
        {
            await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
            await from.WaitMigration("pre-switchover");
        }
        from.Servers[0].Signal(SigStopNumber);
        try
        {
            using var end = new CancellationTokenSource(VmmCommands.Deadline);
            var clock = Stopwatch.StartNew();
            switch (what)
            {
                case "stop":
                    await from.Run("stop");
                    Assert.That((await from.State(), await Lost(from, 0) is not null), Is.EqualTo(("paused", true)));
                    break;
                case "quit":
                    await Vmm.Ok("quit", "--vm", "from");
                    await from.Process.WaitForExit(end.Token);
                    break;
                case "SIGTERM":
                    Posix.Kill(from.Process.Pid, SigTerm);
                    await from.Process.WaitForExit(end.Token);
                    break;
                case "migrate_cancel":
                    await from.Run("migrate-continue", new JsonObject { ["state"] = "pre-switchover" });
                    await from.Run("migrate_cancel");
                    await from.WaitMigration("cancelled", "failed");
                    Assert.That(await from.State(), Is.EqualTo("running"));
                    break;
            }
            // One missed deadline, and what a busy machine needs beside it.
            int limitMs = migrates ? VfioUserDeadlines.StateMs : VfioUserDeadlines.RequestMs;
            Assert.That(clock.ElapsedMilliseconds, Is.LessThan(limitMs + 10_000));
        }
        finally
        {
            from.Servers[0].Signal(SigKillNumber);
        }
    }

    /// <summary>Why a device is lost; null while it is there.</summary>
    private static async Task<string?> Lost(VfioUserVm vm, int device)
    {
        JsonArray all = (await vm.Run(QmpServer.ExtensionPrefix + "query-devices"))!.AsArray();
        JsonNode one = all.Single(d => d!["id"]!.ToString() == $"dev{device}")!;
        Assert.That(one["state"]!.ToString(), Is.EqualTo(one["reason"] is null ? "present" : "lost"));
        return one["reason"]?.ToString();
    }

    private static async Task WaitLost(VfioUserVm vm, int device)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await Lost(vm, device) is null || (await vm.Run("query-migrate"))!["blocked-reasons"] is null) limit.Token.ThrowIfCancellationRequested();
    }

    [Test]
    public async Task TheDestinationsServerDies([Values] Moment moment)
    {
        VfioUserVm from = await VfioUserVm.Start(Vmm, "from", [",seed=1,state-size=8M"]);
        VfioUserVm to = await VfioUserVm.Start(Vmm, "to", [",seed=2,state-size=8M"], "--incoming", "tcp:127.0.0.1:0");
        await Prepare(from, moment);
        if (moment == Moment.BeforeTheMigration) await Kill(to);
        await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
        await Reach(from, moment, () => Kill(to));
        Assert.That(await from.WaitMigration("failed", "completed"), Is.EqualTo("failed"));
        Assert.That((await from.Run("query-migrate"))!["error-desc"]!.ToString(), Does.Contain("destination").And.Contain("to-0.sock"), "the source's reason also names the device");
        Assert.That((await from.State(), await to.State()), Is.EqualTo(("running", "inmigrate")));
        // The source's device still runs, as before the attempt.
        await from.WaitForBlocks(0, 20);
        await from.AssertMemory(0);
    }

    private static async Task Prepare(VfioUserVm from, Moment moment)
    {
        await from.SetUp();
        await from.StartDma(0);
        await from.Run("migrate-set-capabilities", Capability("return-path", true));
        if (moment == Moment.BeforeTheSwitchover) await from.Run("migrate-set-capabilities", Capability("pause-before-switchover", true));
        // The bandwidth is so low that precopy does not converge.
        if (moment == Moment.InPrecopy) await from.Run("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 4 << 20 });
    }

    private static async Task Reach(VfioUserVm from, Moment moment, Func<Task> kill)
    {
        switch (moment)
        {
            case Moment.InPrecopy:
                await from.WaitMigration("active");
                // The loss ends the migration, although the bandwidth would let it go on for minutes.
                await kill();
                break;
            case Moment.BeforeTheSwitchover:
                await from.WaitMigration("pre-switchover");
                await kill();
                break;
        }
    }

    private static async Task Kill(VfioUserVm vm)
    {
        vm.Servers[0].Signal(SigKillNumber);
        await vm.Servers[0].Finish();
    }

    internal static async Task Migrate(VfioUserVm from, VfioUserVm to)
    {
        await from.Run("migrate-set-capabilities", Capability("return-path", true));
        await from.Run("migrate-set-parameters", new JsonObject { ["downtime-limit"] = 20_000, ["max-bandwidth"] = 0 });
        await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
        string end = await from.WaitMigration("completed", "failed", "cancelled");
        Assert.That(end, Is.EqualTo("completed"), (await from.Run("query-migrate"))!.ToJsonString());
        await to.WaitMigration("completed");
    }

    internal static JsonObject Capability(string name, bool on) =>
        new() { ["capabilities"] = new JsonArray(new JsonObject { ["capability"] = name, ["state"] = on }) };

    private static void AssertPhases(List<string> trace, string first, string second)
    {
        string text = string.Join(", ", trace);
        int lastPrepare = trace.FindLastIndex(e => e.EndsWith(" " + first, StringComparison.Ordinal));
        int firstMain = trace.FindIndex(lastPrepare < 0 ? 0 : trace.FindIndex(e => e.EndsWith(" " + first, StringComparison.Ordinal)), e => e.EndsWith(" " + second, StringComparison.Ordinal));
        Assert.That(trace.Count(e => e.EndsWith(" " + first, StringComparison.Ordinal)), Is.EqualTo(3), text);
        Assert.That(lastPrepare, Is.LessThan(firstMain), $"every device is in {first} before any is in {second}: {text}");
    }
}
