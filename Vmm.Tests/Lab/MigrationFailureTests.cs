using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration.Status;

namespace Vmm.Tests.Lab;

/// <summary>Each row of the failure table (vfio-migration 3.9, 3.2 and 3.10), on devices that a test makes fail.</summary>
public sealed class MigrationFailureTests : LabDeviceFixture
{
    [TestCase("v2", VfioDeviceState.Running, VfioDeviceState.PreCopy)]
    [TestCase("v2", VfioDeviceState.PreCopy, VfioDeviceState.PreCopyP2P)]
    [TestCase("v2", VfioDeviceState.PreCopyP2P, VfioDeviceState.StopCopy)]
    [TestCase("v2_stopcopy", VfioDeviceState.Running, VfioDeviceState.Stop)]
    [TestCase("v2_noprecopy", VfioDeviceState.Stop, VfioDeviceState.StopCopy)]
    public async Task Spec3_9_AnArcThatIsRefusedOnTheSourceFailsTheMigrationAndTheVmRunsOn(string type, VfioDeviceState from, VfioDeviceState to)
    {
        LabDevice source = Make(type);
        using var pair = new LabPair(true, [source.Path], [Make(type).Path]);
        source["refuse"] = $"{(int)from} {(int)to} {(int)Errno.EIO} 1";
        await FailsAndRunsOn(pair, from is VfioDeviceState.Running or VfioDeviceState.Stop ? "refused" : null);
    }

    [Test]
    public async Task Spec3_9_ADeviceThatBreaksInPrecopyIsResetAndTheVmRunsOn()
    {
        LabDevice source = Make("v2");
        (source["precopy_bytes"], source["chunk_bytes"], source["delay_us"]) = (60000, 64, 20000);
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        source["log"] = 0;
        Task<(MigrationStatus Source, MigrationStatus Destination)> migration = pair.Migrate();
        // The data of PRE_COPY takes 20 s to read, so the device is still in PRE_COPY when it breaks.
        Assert.That(() => source.States.LastOrDefault(), Is.EqualTo((int)VfioDeviceState.PreCopy).After(60_000, 20));
        source["broken"] = 1;
        Assert.That((await migration).Source, Is.EqualTo(MigrationStatus.Failed), pair.Reasons);
        AssertRuns(pair);
    }

    [Test]
    public async Task Spec3_9_AReadThatFailsAtTheCompletion()
    {
        LabDevice source = Make("v2");
        source["enomsg"] = 2;
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        await FailsAndRunsOn(pair, "ENOMSG");
    }

    [Test]
    public async Task Spec3_9_AStopRefusedAfterTheCompletionIsNoFailure()
    {
        LabDevice source = Make("v2");
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 31);
        source["refuse"] = $"{(int)VfioDeviceState.StopCopy} {(int)VfioDeviceState.Stop} {(int)Errno.EIO} 1";
        await pair.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
        Assert.That(LabPair.Io(pair.Source).GetMigrationState(out VfioDeviceState state), Is.EqualTo(Errno.None));
        Assert.That(state, Is.EqualTo(VfioDeviceState.Running), "the device was reset");
    }

    [TestCase(VfioDeviceState.Stop, VfioDeviceState.Resuming)]
    [TestCase(VfioDeviceState.Resuming, VfioDeviceState.Stop)]
    public async Task Spec3_9_AnArcThatIsRefusedOnTheDestinationFailsTheLoadAndTheSourceGoesOn(VfioDeviceState from, VfioDeviceState to)
    {
        LabDevice destination = Make("v2");
        using var pair = new LabPair(true, [Make("v2").Path], [destination.Path]);
        destination["refuse"] = $"{(int)from} {(int)to} {(int)Errno.EIO} 1";
        (MigrationStatus source, MigrationStatus loaded) = await pair.Migrate();
        Assert.That((source, loaded), Is.EqualTo((MigrationStatus.Failed, MigrationStatus.Failed)), pair.Reasons);
        Assert.That(pair.Destination.Vm.RunState.IsRunning, Is.False);
        AssertRuns(pair);
    }

    [Test]
    public async Task Spec3_9_StateThatIsTooMuchForTheDestinationFailsTheLoadAndTheSourceGoesOn()
    {
        LabDevice source = Make("v2");
        source["state_bytes"] = 4 << 20;
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        (MigrationStatus status, MigrationStatus loaded) = await pair.Migrate();
        Assert.That((status, loaded), Is.EqualTo((MigrationStatus.Failed, MigrationStatus.Failed)), pair.Reasons);
        Assert.That(pair.Destination.Engine.Query().Error!.Message, Does.Contain("ENOMEM"));
        Assert.That(LabPair.Io(pair.Destination).GetMigrationState(out VfioDeviceState state), Is.EqualTo(Errno.None));
        Assert.That(state, Is.Not.EqualTo(VfioDeviceState.Resuming), "the device was reset, because no other request leaves RESUMING after ENOMEM");
        AssertRuns(pair);
    }

    [Test]
    public async Task Spec3_9_CancelledInPrecopyTheDeviceRunsOn()
    {
        LabDevice source = Make("v2");
        (source["precopy_bytes"], source["chunk_bytes"], source["delay_us"]) = (60000, 64, 20000);
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        source["log"] = 0;
        Task<(MigrationStatus Source, MigrationStatus Destination)> migration = pair.Migrate();
        Assert.That(() => source.States.LastOrDefault(), Is.EqualTo((int)VfioDeviceState.PreCopy).After(60_000, 20));
        pair.Source.Engine.Cancel();
        Assert.That((await migration).Source, Is.EqualTo(MigrationStatus.Cancelled), pair.Reasons);
        AssertRuns(pair);
        Assert.That(source.States, Is.EqualTo((int[])[(int)VfioDeviceState.PreCopy, (int)VfioDeviceState.Running]));
    }

    [Test]
    public async Task Spec3_2_ADeviceWhoseResetFailsTooIsBroken()
    {
        LabDevice source = Make("v2");
        using var pair = new LabPair(true, [source.Path], [Make("v2").Path]);
        source["refuse"] = $"{(int)VfioDeviceState.PreCopy} {(int)VfioDeviceState.PreCopyP2P} {(int)Errno.EIO} 1";
        source["refuse_reset"] = 1;
        Assert.That((await pair.Migrate()).Source, Is.EqualTo(MigrationStatus.Failed), pair.Reasons);
        Assert.That(pair.Source.Engine.Query().Error!.Message, Does.Contain("broken"));
        pair.Source.Vm.Reset();
        LabMemory.Fill(LabPair.Io(pair.Source), 33);
        Assert.That((LabPair.Io(pair.Source).GetMigrationState(out VfioDeviceState state), state), Is.EqualTo((Errno.None, VfioDeviceState.Running)), "a reset of the VM makes the device usable again");
    }

    [Test]
    public async Task Spec3_10_ALogWhoseReportsFailMakesEverythingDirtyAndTheMigrationGoesOn()
    {
        LabDevice source = Make("v2"), destination = Make("v2");
        foreach (LabDevice device in Made) device["dma_log"] = 1;
        source["dma_log_errno"] = (int)Errno.EIO;
        using var pair = new LabPair(true, [source.Path], [destination.Path]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 32);
        await pair.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
        Assert.That(pair.Source.Engine.Query().Ram!.TransferredBytes, Is.GreaterThan(0));
    }

    [Test]
    public async Task Spec3_10_WithLogsOfAllDevicesOnlyWhatWasWrittenIsSentAgain()
    {
        foreach (int _ in Enumerable.Range(0, 4)) Make("v2")["dma_log"] = 1;
        using var pair = new LabPair(true, [Made[0].Path, Made[1].Path], [Made[2].Path, Made[3].Path]);
        await pair.MigrateWell();
        Assert.That(pair.Source.Engine.Query().Ram!.NormalPages + pair.Source.Engine.Query().Ram!.DuplicatePages, Is.EqualTo((1 << 20) / 4096), "the source sends each page once");
    }

    private static async Task FailsAndRunsOn(LabPair pair, string? named)
    {
        Assert.That((await pair.Migrate()).Source, Is.EqualTo(MigrationStatus.Failed), pair.Reasons);
        if (named is not null) Assert.That(pair.Source.Engine.Query().Error!.Message, Does.Contain(named));
        AssertRuns(pair);
    }

    private static void AssertRuns(LabPair pair)
    {
        Assert.That(pair.Source.Vm.RunState.IsRunning, pair.Reasons);
        Assert.That((LabPair.Io(pair.Source).GetMigrationState(out VfioDeviceState state), state), Is.EqualTo((Errno.None, VfioDeviceState.Running)));
    }
}
