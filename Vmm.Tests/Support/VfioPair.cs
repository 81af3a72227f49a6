using NUnit.Framework;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Support;

/// <summary>Two VMs in this process with the same fake VFIO devices. The source runs.</summary>
internal sealed class VfioPair : IDisposable
{
    internal static readonly TimeSpan Deadline = TimeSpan.FromSeconds(30);

    internal VfioPair(Func<int, FakeVfioDevice> source, Func<int, FakeVfioDevice> destination, int devices = 1, VfioMigrationOptions? options = null, ulong ramBytes = 64 << 10)
    {
        Source = Host(ramBytes, incoming: false);
        Destination = Host(ramBytes, incoming: true);
        for (int i = 0; i < devices; i++)
        {
            SourceDevices.Add(Add(Source, i, source(i), options));
            DestinationDevices.Add(Add(Destination, i, destination(i), options));
        }
        Source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        // A high downtime limit lets the engine switch over at once, however much state the devices report.
        Source.Engine.Parameters = Source.Engine.Parameters with { DowntimeLimitMs = 2_000_000, MaxBandwidthBytesPerSecond = 0 };
        Source.Vm.Cont();
    }

    internal TestVm Source { get; }

    internal TestVm Destination { get; }

    internal List<FakeVfioPci> SourceDevices { get; } = [];

    internal List<FakeVfioPci> DestinationDevices { get; } = [];

    internal FakeVfioPci From => SourceDevices[0];

    internal FakeVfioPci To => DestinationDevices[0];

    internal static TestVm Host(ulong ramBytes, bool incoming) => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = ramBytes }], IsIncoming = incoming },
        static b => b.AddPlugin<VfioPlugin>());

    internal static FakeVfioPci Add(TestVm vm, int index, FakeVfioDevice io, VfioMigrationOptions? options = null)
    {
        var made = (FakeVfioPci)vm.Vm.AddDevice(s => new FakeVfioPci($"vfio{index}", $"0000:00:{index + 2:x2}.0", io, s, options));
        return made;
    }

    /// <summary>Migrates over an in-memory channel and returns the status of both sides.</summary>
    internal async Task<(MigrationStatus Source, MigrationStatus Destination)> Migrate()
    {
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = Destination.Engine.MigrateIncoming(b);
        MigrationStatus source = await Source.Engine.Migrate(a).WaitAsync(Deadline);
        return (source, await incoming.WaitAsync(Deadline));
    }

    /// <summary>Migrates and expects success; a failure shows the engines' reasons.</summary>
    internal async Task MigrateWell()
    {
        (MigrationStatus source, MigrationStatus destination) = await Migrate();
        Assert.That((source, destination), Is.EqualTo((MigrationStatus.Completed, MigrationStatus.Completed)), Reasons);
    }

    internal string Reasons() => $"source: {Source.Engine.Query().Error}; destination: {Destination.Engine.Query().Error}";

    /// <summary>Asserts what holds after every migration: one side runs, its devices run, and no data session or dirty log is open.</summary>
    internal void AssertOneSideRuns(bool atSource)
    {
        Assert.Multiple(() =>
        {
            Assert.That(Source.Vm.RunState.IsRunning, Is.EqualTo(atSource), $"source runs; {Reasons()}");
            Assert.That(Destination.Vm.RunState.IsRunning, Is.EqualTo(!atSource), $"destination runs; {Reasons()}");
            foreach (FakeVfioPci device in atSource ? SourceDevices : DestinationDevices)
                Assert.That(device.State, Is.EqualTo(VfioDeviceState.Running), $"{device.Id} on the side that runs");
            foreach (FakeVfioPci device in SourceDevices.Concat(DestinationDevices))
            {
                if (device.Io.V1 is null) Assert.That(device.State, Is.EqualTo(device.Io.MigrationState), $"{device.Id}: cached state");
                Assert.That(device.Io.OpenSessions, Is.Zero, $"{device.Id}: open sessions");
                Assert.That(device.Io.IsLogging, Is.False, $"{device.Id}: dirty log");
            }
        });
    }

    public void Dispose()
    {
        Source.Dispose();
        Destination.Dispose();
    }
}
