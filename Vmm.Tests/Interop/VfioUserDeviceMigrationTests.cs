using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Interop;

/// <summary>
/// Migrates the other shipped devices (a GPIO card, the sample device and edu) between two <c>vmm run</c> processes. One server process has
/// all devices of a VM. Covers a live migration after three cancels, and a server that dies and is started again.
/// </summary>
[TestFixture, Category("interop")]
internal sealed class VfioUserDeviceMigrationTests : EndToEnd
{
    private const uint GpioPort = 0xb000, SamplePort = 0xd000;
    private const int Gpio = 0, Sample = 1, Edu = 2, DmaTest = 3;

    private static readonly string[] s_types = ["gpio-pci-idio-16,p2p=on", "sample,bar1=memory,p2p=on", "edu,p2p=on", "dma-test,seed=1,state-size=1M,p2p=on"];

    [Test]
    public async Task DevicesOfOneServerProcessMoveTogetherAfterThreeCancels()
    {
        VfioUserVm from = await VfioUserVm.StartTogether(Vmm, "from", s_types);
        VfioUserVm to = await VfioUserVm.StartTogether(Vmm, "to", s_types, "--incoming", "tcp:127.0.0.1:0");
        await Program(from);
        await from.Out(GpioPort, 0x05);
        long due = DateTimeOffset.UtcNow.ToUnixTimeSeconds() + 1000;
        await from.Out(SamplePort, (uint)due);
        uint edu = await from.ConfigRead(Edu, 4);
        await from.SetUp(DmaTest);
        await from.StartDma(DmaTest);
        await from.Run("migrate-set-capabilities", VfioUserMigrationTests.Capability("pause-before-switchover", true));
        for (int i = 0; i < 3; i++)
        {
            await from.Run("migrate", new JsonObject { ["uri"] = to.Process.IncomingUri });
            await from.WaitMigration("pre-switchover");
            await from.Run("migrate_cancel");
            Assert.That(await from.WaitMigration("cancelled", "completed", "failed"), Is.EqualTo("cancelled"));
            Assert.That((await from.State(), await Levels(from)), Is.EqualTo(("running", 0xfau)));
        }
        await from.Run("migrate-set-capabilities", VfioUserMigrationTests.Capability("pause-before-switchover", false));
        await VfioUserMigrationTests.Migrate(from, to);
        Assert.That((await from.State(), await to.State()), Is.EqualTo(("postmigrate", "running")));
        await to.WaitForBlocks(DmaTest, 20);
        await to.AssertMemory(DmaTest);
        Assert.That(await Levels(to), Is.EqualTo(0xfau));
        await to.Out(GpioPort, 0x05);
        await to.Out(GpioPort, 0x05);
        Assert.That(await Levels(to), Is.EqualTo(0xffu), "the counts continue after the migration");
        Assert.That((int)await to.In(SamplePort), Is.InRange(-1000, -800), "the timer keeps its due time");
        Assert.That(await to.ConfigRead(Edu, 4), Is.EqualTo(edu));
    }

    [Test]
    public async Task AServerThatDiedIsStartedAgainForANewVmAndTheFirstVmGoesOnWithoutItsDevices()
    {
        VfioUserVm vm = await VfioUserVm.StartTogether(Vmm, "from", s_types);
        await Program(vm);
        await vm.Out(GpioPort, 0x05);
        vm.Servers[0].Signal(SigKill);
        await vm.Servers[0].Finish();
        Assert.That((await vm.In(GpioPort), await vm.State()), Is.EqualTo((uint.MaxValue, "running")));
        // A new server may bind over the socket that the dead server left. Its devices start from power-on, and they can migrate.
        VfioUserVm next = await VfioUserVm.Attach(Vmm, "next", await VfioUserVm.ServeTogether(Vmm, "from", s_types), "from", s_types.Length);
        VfioUserVm to = await VfioUserVm.StartTogether(Vmm, "to", s_types, "--incoming", "tcp:127.0.0.1:0");
        await Program(next);
        await next.Out(GpioPort, 0x05);
        await VfioUserMigrationTests.Migrate(next, to);
        Assert.That((await next.State(), await to.State(), await Levels(to)), Is.EqualTo(("postmigrate", "running", 0xfau)));
    }

    [Test]
    public async Task EduMovesWhileItsGuestKeepsItBusyWithDma()
    {
        PeerProcess from = await EduVm("from"), to = await EduVm("to", "--incoming", "tcp:127.0.0.1:0");
        await WaitSteps(from, 100);
        await from.Monitor.Execute("migrate-set-capabilities", VfioUserMigrationTests.Capability("return-path", true), CancellationToken.None);
        await Vmm.Ok("migrate", "--vm", "from", "--to", to.IncomingUri);
        long[] arrived = await EduWords(to);
        await WaitSteps(to, arrived[0] + 100);
        Assert.That((await EduWords(to))[1], Is.Zero, "edu returned wrong data in some pages");
    }

    private async Task<PeerProcess> EduVm(string name, params string[] arguments)
    {
        await Vmm.Start("device", "serve", "--type", "edu", "--socket", Vmm[$"{name}.sock"]).Line("serving edu");
        return await Vmm.StartVmOf(name, "1M,id=edu", ["--device", $"vfio-user-pci,socket={Vmm[$"{name}.sock"]},enable-migration=on", "--device", "edu-guest", .. arguments]);
    }

    /// <summary>Waits until the guest has done this many steps. A lost interrupt stops the guest, so that the wait times out.</summary>
    private async Task WaitSteps(PeerProcess vm, long steps)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while ((await EduWords(vm))[0] < steps) limit.Token.ThrowIfCancellationRequested();
    }

    /// <summary>Reads the counters that <c>EduGuest</c> keeps in RAM: steps done, wrong pages.</summary>
    private async Task<long[]> EduWords(PeerProcess vm)
    {
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = 0, ["size"] = 16, ["filename"] = Vmm["words"] }, CancellationToken.None);
        byte[] bytes = await File.ReadAllBytesAsync(Vmm["words"]);
        return [BitConverter.ToInt64(bytes, 0), BitConverter.ToInt64(bytes, 8)];
    }

    private static async Task Program(VfioUserVm vm)
    {
        await vm.ConfigWrite(Gpio, 0x18, GpioPort | 1);
        await vm.ConfigWrite(Sample, 0x10, SamplePort | 1);
        foreach (int device in (int[])[Gpio, Sample, Edu]) await vm.ConfigWrite(device, 4, 7);
        Assert.That(await vm.ConfigRead(Edu, 0), Is.EqualTo(0x11e81234u));
        Assert.That(await Levels(vm), Is.EqualTo(0xffu));
    }

    /// <summary>Reads the GPIO levels (byte 1): a pin is high while its count is divisible by 3.</summary>
    private static async Task<uint> Levels(VfioUserVm vm) => await vm.In(GpioPort) >> 8 & 0xff;
}
