using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration;
using Vmm.Migration.Snapshot;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>A VFIO device takes part in its VM's snapshots and events.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioHostTests
{
    [Test]
    public void ASnapshotHoldsTheDevice([Values] bool running, [Values] bool v1)
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder);
        byte[] state = VfioMigrationTests.Bytes(5000, 1);
        FakeV1Region? region = v1 ? new FakeV1Region(1024) { Data = state } : null;
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a") { State = state, V1 = region });
        (device.Config.Bytes[9], device.Config.Bytes[0]) = (0x77, 0);
        if (running) vm.Vm.Cont();
        vm.Vm.Snapshots().Save("one", overwrite: false, null, CancellationToken.None);
        device.Io.State = [1];
        device.Config.Bytes = new byte[276];
        region?.Committed.Clear();
        int writes = 0;
        vm.Vm.Snapshots().Load("one", null, CancellationToken.None);
        writes += device.Io.Calls.Count(static c => c == "Data.Write");
        byte[] loaded = v1 ? [.. region!.Committed.SelectMany(static c => c)] : device.Io.State;
        Assert.That(loaded, Is.EqualTo(state));
        Assert.That(device.Config.Bytes[9], Is.EqualTo(0x77));
        Assert.That(device.Config.Trace.Count(static t => t == "LoadConfig"), Is.EqualTo(1), "the check of the file before the load does not touch the device");
        if (!v1) Assert.That(writes, Is.EqualTo(1));
        Assert.That(vm.Vm.RunState.IsRunning, Is.EqualTo(running));
        if (running) Assert.That(device.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public void ABadSnapshotLeavesTheDeviceAsItIs()
    {
        using var folder = new TempDirectory();
        using TestVm vm = WithStore(folder);
        FakeVfioPci device = VfioPair.Add(vm, 0, new FakeVfioDevice("a") { State = [1, 2, 3] });
        vm.Vm.Cont();
        vm.Vm.Snapshots().Save("one", overwrite: false, null, CancellationToken.None);
        string path = Path.Combine(folder.Path, "store", "one", "vmstate");
        byte[] bytes = File.ReadAllBytes(path);
        bytes[^1] ^= 1;
        File.WriteAllBytes(path, bytes);
        (int resets, int loads) = (device.Io.Resets, device.Config.Trace.Count(static t => t == "LoadConfig"));
        Assert.That(() => vm.Vm.Snapshots().Load("one", null, CancellationToken.None), Throws.InstanceOf<VmmException>());
        Assert.That(device.Config.Trace.Count(static t => t == "LoadConfig"), Is.EqualTo(loads));
        Assert.That(device.Io.Transitions, Has.None.EqualTo(VfioDeviceState.Resuming));
        Assert.That((vm.Vm.RunState.IsRunning, device.State), Is.EqualTo((true, VfioDeviceState.Running)));
        Assert.That(device.Io.Resets, Is.EqualTo(resets), "a device that the load did not touch needs no reset");
    }

    [Test]
    public async Task EachChangeOfStateIsAnEventWhenAskedFor([Values] bool on)
    {
        using var pair = new VfioPair(
            _ => new FakeVfioDevice("a", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy) { State = [1] }, _ => new FakeVfioDevice("b"),
            options: new VfioMigrationOptions { MigrationEvents = on });
        var events = new List<string>();
        pair.Source.Vm.Events.Raised += (name, data) =>
        {
            lock (events) events.Add(string.Join(',', data.Select(static d => d.Value).Prepend(name)));
        };
        await pair.MigrateWell();
        string[] expected = ["pre-copy", "pre-copy-p2p-prepare", "pre-copy-p2p", "stop-copy", "stop"];
        Assert.That(events, Is.EqualTo(on ? expected.Select(static s => $"VFIO_MIGRATION,vfio0,/machine/peripheral/vfio0,{s}") : []));
    }

    private static TestVm WithStore(TempDirectory folder) => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 64 << 10 }] },
        b =>
        {
            b.AddPlugin<VfioPlugin>();
            b.Services.AddSingleton(new SnapshotOptions { Directory = folder["store"] });
        });
}
