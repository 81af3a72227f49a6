using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>A VM with real devices: which block its migration, and which states stop and start pass (vfio-migration 3.1 to 3.5, 3.8).</summary>
public sealed class VmDeviceTests : LabDeviceFixture
{
    [Test]
    public void Spec3_1_EnableMigrationOffBlocksADeviceThatCould()
    {
        using TestVm vm = Vm($"sysfsdev={LabVfio.Mtty1},enable-migration=off");
        Assert.That(Blockers(vm), Has.Some.Contains("d0").And.Some.Contains("enable-migration"));
    }

    [Test]
    public void Spec3_1_EnableMigrationOnRefusesADeviceThatCannot() =>
        Assert.That(() => Vm($"sysfsdev={LabVfio.Edu},enable-migration=on"), Throws.InstanceOf<VmmException>().With.Message.Contains("enable-migration=on"));

    [Test]
    public void Spec3_1_ABlockedDeviceBlocksNormalMigrationOnly()
    {
        using TestVm vm = Vm($"sysfsdev={LabVfio.Edu},iommufd=off");
        Assert.That(Blockers(vm), Is.Not.Empty);
        Assert.That(vm.Vm.Services.GetRequiredService<MigrationBlockers>().Reasons(MigrationMode.CprTransfer), Is.Empty);
    }

    [TestCase(false, 0)]
    [TestCase(true, 1)]
    public void Spec3_1_WithoutAnyLogOfItsDmaADeviceBlocksUnlessAskedFor(bool iommufd, int blockers)
    {
        string device = $"sysfsdev={LabVfio.Mtty1},x-device-dirty-page-tracking=off,iommufd={(iommufd ? "on" : "off")}";
        using (TestVm vm = Vm(device)) Assert.That(Blockers(vm).Count(), Is.EqualTo(blockers), "type1 has a log, an emulated IOMMU under iommufd has none");
        using (TestVm vm = Vm($"{device},enable-migration=on")) Assert.That(Blockers(vm), Is.Empty);
    }

    [TestCase("v2", new[] { RunningP2P, Stop }, new[] { RunningP2P, Running })]
    [TestCase("v2_noprecopy", new[] { RunningP2P, Stop }, new[] { RunningP2P, Running })]
    [TestCase("v2_nop2p", new[] { Stop }, new[] { Running })]
    [TestCase("v2_stopcopy", new[] { Stop }, new[] { Running })]
    public void Spec3_3_DevicesStopAndStartWithTheVm(string type, int[] stop, int[] start)
    {
        LabDevice device = Make(type);
        using TestVm vm = Vm($"sysfsdev={device.Path},enable-migration=on");
        vm.Vm.Cont();
        device["log"] = 0;
        vm.Vm.Stop();
        vm.Vm.Stop();
        Assert.That(device.States, Is.EqualTo(stop));
        device["log"] = 0;
        vm.Vm.Cont();
        vm.Vm.Cont();
        Assert.That(device.States, Is.EqualTo(start));
    }

    [TestCase("v2", new[] { PreCopy, PreCopyP2P, StopCopy, Stop })]
    [TestCase("v2_nop2p", new[] { PreCopy, StopCopy, Stop })]
    [TestCase("v2_noprecopy", new[] { RunningP2P, Stop, StopCopy, Stop })]
    [TestCase("v2_stopcopy", new[] { Stop, StopCopy, Stop })]
    public async Task Spec3_4_TheSourceWalksTheStatesOfItsFlags(string type, int[] walked)
    {
        (LabDevice from, LabDevice to) = (Make(type), Make(type));
        using var pair = new LabPair(true, [from.Path], [to.Path]);
        foreach (LabDevice device in Made) device["log"] = 0;
        await pair.MigrateWell();
        Assert.That(from.States, Is.EqualTo(walked), "a device without PRE_COPY runs until the switchover; each device ends in STOP");
    }

    [Test]
    public async Task Spec3_4_ADeviceThatIsStoppedIsNotStartedToBeRead()
    {
        (LabDevice from, LabDevice to) = (Make("v2"), Make("v2"));
        using var pair = new LabPair(true, [from.Path], [to.Path]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 21);
        pair.Source.Vm.Stop();
        from["log"] = 0;
        (MigrationStatus source, MigrationStatus destination) = await pair.Migrate();
        Assert.That((source, destination), Is.EqualTo((MigrationStatus.Completed, MigrationStatus.Completed)), pair.Reasons);
        Assert.That(from.States, Is.EqualTo((int[])[StopCopy, Stop]));
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [TestCase("0")]
    [TestCase("1")]
    public async Task Spec3_4_ADeviceThatMisjudgesItsSizeMovesAllTheSame(string told)
    {
        (LabDevice from, LabDevice to) = (Make("v2"), Make("v2"));
        from["data_size"] = told;
        using var pair = new LabPair(true, [from.Path], [to.Path]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 22);
        await pair.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [TestCase("v2", new[] { RunningP2P, Running })]
    [TestCase("v2_stopcopy", new[] { Running })]
    public async Task Spec3_5_TheDestinationLoadsStoppedIsCheckedAndThenStarts(string type, int[] start)
    {
        (LabDevice from, LabDevice to) = (Make(type), Make(type));
        using var pair = new LabPair(true, [from.Path], [to.Path]);
        await pair.MigrateWell();
        int[] states = [.. to.States];
        int resuming = Array.IndexOf(states, Resuming);
        Assert.That(states.Skip(resuming), Is.EqualTo((int[])[Resuming, Stop, .. start]));
        Assert.That(states.Take(resuming), Has.None.EqualTo(StopCopy).And.None.EqualTo(PreCopy));
    }

    [Test]
    public async Task Spec3_6_AFirstPartThatAppearsAgainIsAcknowledgedAgain()
    {
        (LabDevice from, LabDevice to) = (Make("v2"), Make("v2"));
        from["reinit"] = 2;
        using var pair = new LabPair(true, [from.Path], [to.Path]);
        foreach (IMigrationEngine engine in (IMigrationEngine[])[pair.Source.Engine, pair.Destination.Engine])
            engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.SwitchoverAck, true)]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 23);
        await pair.MigrateWell();
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [Test]
    public async Task Spec3_7_TheFinalStateOfMttyGoesOverMultifd([Values] bool iommufd)
    {
        using var pair = new LabPair(iommufd, [LabVfio.Mtty1], [LabVfio.Mtty2], ",x-migration-multifd-transfer=on");
        byte[] expected = Uart.Change(LabPair.Io(pair.Source));
        await pair.MigrateWellOverMultifd();
        Assert.That(Uart.Observe(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [TestCase("v2")]
    [TestCase("v2_noprecopy")]
    public async Task Spec3_7_LargeStatesOfTwoDevicesGoOverMultifdTogether(string type)
    {
        LabDevice[] devices = [Make("v2"), Make(type), Make("v2"), Make(type)];
        foreach (LabDevice device in devices) device["state_bytes"] = 5 << 20;
        using var pair = new LabPair(true, [devices[0].Path, devices[1].Path], [devices[2].Path, devices[3].Path], ",x-migration-multifd-transfer=on");
        byte[][] expected = [LabMemory.Fill(LabPair.Io(pair.Source, 0), 41), LabMemory.Fill(LabPair.Io(pair.Source, 1), 42)];
        await pair.MigrateWellOverMultifd();
        Assert.That((LabMemory.Read(LabPair.Io(pair.Destination, 0)), LabMemory.Read(LabPair.Io(pair.Destination, 1))), Is.EqualTo((expected[0], expected[1])));
        Assert.That(pair.Source.Engine.Query().Ram!.MultifdBytes, Is.GreaterThan(10 << 20));
    }

    [Test]
    public async Task Spec3_7_ADriverThatRefusesItsStateFailsTheLoadAndTheSourceGoesOn()
    {
        (LabDevice from, LabDevice to) = (Make("v2"), Make("v2"));
        from["state_bytes"] = 3 << 20;
        using var pair = new LabPair(true, [from.Path], [to.Path], ",x-migration-multifd-transfer=on");
        foreach (IMigrationEngine engine in (IMigrationEngine[])[pair.Source.Engine, pair.Destination.Engine]) engine.SetCapabilities([new(MigrationCapability.Multifd, true)]);
        Task<MigrationStatus> incoming = pair.Destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        MigrationStatus source = await pair.Source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{pair.Destination.Engine.Query().SocketAddresses[0].Port}")).WaitAsync(TimeSpan.FromSeconds(120));
        Assert.That((source, await incoming.WaitAsync(TimeSpan.FromSeconds(120))), Is.EqualTo((MigrationStatus.Failed, MigrationStatus.Failed)), pair.Reasons);
        Assert.That(pair.Source.Vm.RunState.IsRunning);
        Assert.That(LabPair.Io(pair.Source).GetMigrationState(out VfioDeviceState state), Is.EqualTo(Errno.None));
        Assert.That(state, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public async Task Spec3_8_EachChangeOfStateIsAnEventAndDataAreCounted([Values] bool iommufd)
    {
        using var pair = new LabPair(iommufd, [LabVfio.Mtty1], [LabVfio.Mtty2], ",migration-events=on");
        var events = new List<string?>();
        pair.Source.Vm.Events.Raised += (name, data) =>
        {
            lock (events)
                if (name == "VFIO_MIGRATION") events.Add(data.Single(static d => d.Key == "device-state").Value?.ToString());
        };
        await pair.MigrateWell();
        Assert.That(events, Is.EqualTo((string[])["pre-copy", "pre-copy-p2p-prepare", "pre-copy-p2p", "stop-copy", "stop"]));
        Assert.That(pair.Source.Engine.Query().VfioTransferredBytes, Is.EqualTo(96), "24 bytes in PRE_COPY, 72 in STOP_COPY");
    }

    private static IEnumerable<string> Blockers(TestVm vm) => vm.Vm.Services.GetRequiredService<MigrationBlockers>().Reasons(MigrationMode.Normal);

    private static TestVm Vm(string device) => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }], Devices = [DeviceOptions.Parse($"vfio-pci,id=d0,{device}")] },
        static b => b.AddPlugin<VfioPlugin>());
}
