using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Tests.Lab;

/// <summary>Whole migrations between two VMs with devices of the kernel.</summary>
[TestFixture(false, TestName = "Migration(group)")]
[TestFixture(true, TestName = "Migration(iommufd)")]
public sealed class LabMigrationTests(bool iommufd) : LabDeviceFixture
{
    [Test]
    public async Task Spec3_MttyMovesWithItsRegistersAndFifo()
    {
        using var pair = new LabPair(iommufd, [LabVfio.Mtty1], [LabVfio.Mtty2]);
        byte[] expected = Uart.Change(LabPair.Io(pair.Source));
        await pair.MigrateWell();
        Assert.That(Uart.Observe(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [Test]
    public async Task Spec3_TwoDevicesCeaseP2PBeforeEitherStops()
    {
        LabDevice[] source = [Make("v2"), Make("v2")], destination = [Make("v2"), Make("v2")];
        using var pair = new LabPair(iommufd, Paths(source), Paths(destination));
        byte[][] expected = [LabMemory.Fill(LabPair.Io(pair.Source, 0), 1), LabMemory.Fill(LabPair.Io(pair.Source, 1), 2)];
        foreach (LabDevice device in Made) device["log"] = 0;
        await pair.MigrateWell();
        Assert.That(source[0].States, Is.EqualTo((int[])[PreCopy, PreCopyP2P, StopCopy, Stop]));
        Assert.That(source[1].States, Is.EqualTo(source[0].States));
        Assert.That(source.Max(d => Place(d, PreCopyP2P)), Is.LessThan(source.Min(d => Place(d, StopCopy))), "both devices are in P2P before the first stops");
        Assert.That(destination.Select(static d => d.States.Take(2)), Is.All.Not.Empty);
        Assert.That(destination.Max(d => Place(d, RunningP2P)), Is.LessThan(destination.Min(d => Place(d, Running, last: true))), "both devices are in P2P before the first runs");
        Assert.That((LabMemory.Read(LabPair.Io(pair.Destination, 0)), LabMemory.Read(LabPair.Io(pair.Destination, 1))), Is.EqualTo((expected[0], expected[1])));
    }

    [Test]
    public void Spec3_1_SeveralDevicesMustAllSpeakP2P()
    {
        // The pair asks for enable-migration=on, so the second device is refused, as in QEMU.
        Assert.That(() => new LabPair(iommufd, Paths([Make("v2"), Make("v2_nop2p")]), []).Dispose(), Throws.TypeOf<VfioException>().With.Message.Contains("all support P2P"));
    }

    [TestCase("v2")]
    [TestCase("v2_nop2p")]
    [TestCase("v2_noprecopy")]
    [TestCase("v2_stopcopy")]
    public async Task Spec3_EverySetOfFlagsMoves(string type)
    {
        using var pair = new LabPair(iommufd, [Make(type).Path], [Make(type).Path]);
        await MoveMemory(pair, 3);
    }

    [Test]
    public async Task Spec8_2_EnomsgReinitAndShortReadsDoNotStopIt()
    {
        LabDevice source = Make("v2"), destination = Make("v2");
        (source["enomsg"], source["reinit"], source["chunk_bytes"], destination["chunk_bytes"]) = (1, 2, 37, 11);
        using var pair = new LabPair(iommufd, [source.Path], [destination.Path]);
        await MoveMemory(pair, 4);
    }

    [Test]
    public async Task Spec3_ALargeStateMoves()
    {
        LabDevice source = Make("v2"), destination = Make("v2");
        (source["state_bytes"], destination["state_bytes"]) = (40 << 20, 40 << 20);
        using var pair = new LabPair(iommufd, [source.Path], [destination.Path]);
        await MoveMemory(pair, 5);
    }

    [Test]
    public async Task Spec3_SwitchoverAckWaitsForTheFirstPart()
    {
        LabDevice source = Make("v2"), destination = Make("v2");
        (source["precopy_bytes"], source["chunk_bytes"]) = (60000, 4096);
        using var pair = new LabPair(iommufd, [source.Path], [destination.Path]);
        foreach (IMigrationEngine engine in (IMigrationEngine[])[pair.Source.Engine, pair.Destination.Engine])
            engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.SwitchoverAck, true)]);
        await MoveMemory(pair, 6);
    }

    [Test]
    public async Task Spec8_4_AnArcRefusedAtTheStopFailsTheMigrationAndTheVmGoesOnAndTriesAgain()
    {
        LabDevice source = Make("v2");
        using (var pair = new LabPair(iommufd, [source.Path], [Make("v2").Path]))
        {
            LabMemory.Fill(LabPair.Io(pair.Source), 8);
            source["refuse"] = $"{PreCopyP2P} {StopCopy} {(int)Errno.EIO} 1";
            Assert.That((await pair.Migrate()).Source, Is.EqualTo(MigrationStatus.Failed), pair.Reasons);
            Assert.That(pair.Source.Vm.RunState.IsRunning, pair.Reasons);
            Assert.That((LabPair.Io(pair.Source).GetMigrationState(out VfioDeviceState state), state), Is.EqualTo((Errno.None, VfioDeviceState.Running)));
        }
        using var again = new LabPair(iommufd, [source.Path], [Make("v2").Path]);
        await MoveMemory(again, 9);
    }

    [Test]
    public async Task Spec8_6_StateThatTheDestinationsDriverRefusesFailsTheLoad()
    {
        LabDevice destination = Make("v2");
        destination["state_bytes"] = 8192;
        using var pair = new LabPair(iommufd, [Make("v2").Path], [destination.Path]);
        (_, MigrationStatus loaded) = await pair.Migrate();
        Assert.That(loaded, Is.EqualTo(MigrationStatus.Failed));
        Assert.That(pair.Destination.Engine.Query().Error!.Message, Does.Contain(Path.GetFileName(destination.Path)).And.Contain("RESUMING to STOP"));
    }

    [Test]
    public async Task Spec3_CancelledItRunsOnAndMovesTheNextTime()
    {
        LabDevice source = Make("v2");
        (source["state_bytes"], source["delay_us"], source["chunk_bytes"]) = (4 << 20, 20000, 4096);
        byte[] expected;
        using (var pair = new LabPair(iommufd, [source.Path], [Big("v2").Path]))
        {
            expected = LabMemory.Fill(LabPair.Io(pair.Source), 10);
            source["log"] = 0;
            Task<(MigrationStatus Source, MigrationStatus Destination)> migration = pair.Migrate();
            // The state takes 20 s to read, so the cancel comes in STOP_COPY.
            Assert.That(() => source.States.LastOrDefault(), Is.EqualTo(StopCopy).After(60_000, 20));
            pair.Source.Engine.Cancel();
            Assert.That((await migration).Source, Is.EqualTo(MigrationStatus.Cancelled), pair.Reasons);
            Assert.That(pair.Source.Vm.RunState.IsRunning);
            Assert.That(LabMemory.Read(LabPair.Io(pair.Source)), Is.EqualTo(expected));
        }
        (source["delay_us"], source["chunk_bytes"]) = (0, 0);
        using var again = new LabPair(iommufd, [source.Path], [Big("v2").Path]);
        await again.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(again.Destination)), Is.EqualTo(expected));
    }

    private static async Task MoveMemory(LabPair pair, int seed)
    {
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), seed);
        await pair.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    private static string[] Paths(LabDevice[] devices) => [.. devices.Select(static d => d.Path)];

    private static int Place(LabDevice device, int state, bool last = false)
    {
        IEnumerable<int> places = device.Log.Where(l => l.State == state).Select(static l => l.Place);
        return last ? places.Last() : places.First();
    }

    private LabDevice Big(string type)
    {
        LabDevice device = Make(type);
        device["state_bytes"] = 4 << 20;
        return device;
    }
}
