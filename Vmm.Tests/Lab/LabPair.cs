using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>Two VMs in this process with real devices. The source runs.</summary>
internal sealed class LabPair : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(120);

    internal LabPair(bool iommufd, string[] source, string[] destination, string options = "")
    {
        Source = Host(iommufd, source, options, incoming: false);
        Destination = Host(iommufd, destination, options, incoming: true);
        Source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        Source.Engine.Parameters = Source.Engine.Parameters with { DowntimeLimitMs = 2_000_000, MaxBandwidthBytesPerSecond = 0 };
        Source.Vm.Cont();
    }

    internal TestVm Source { get; }

    internal TestVm Destination { get; }

    internal static IVfioDeviceIo Io(TestVm vm, int index = 0) => vm.Vm.Devices.OfType<VfioPciDevice>().ElementAt(index).Io;

    internal async Task<(MigrationStatus Source, MigrationStatus Destination)> Migrate()
    {
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = Destination.Engine.MigrateIncoming(b);
        MigrationStatus source = await Source.Engine.Migrate(a).WaitAsync(s_deadline);
        return (source, await incoming.WaitAsync(s_deadline));
    }

    /// <summary>Migrates over TCP with multifd and expects success.</summary>
    internal async Task MigrateWellOverMultifd()
    {
        foreach (IMigrationEngine engine in (IMigrationEngine[])[Source.Engine, Destination.Engine]) engine.SetCapabilities([new(MigrationCapability.Multifd, true)]);
        Task<MigrationStatus> incoming = Destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        MigrationStatus source = await Source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{Destination.Engine.Query().SocketAddresses[0].Port}")).WaitAsync(s_deadline);
        Assert.That((source, await incoming.WaitAsync(s_deadline)), Is.EqualTo((MigrationStatus.Completed, MigrationStatus.Completed)), Reasons);
        Assert.That(Destination.Vm.RunState.IsRunning);
    }

    internal async Task MigrateWell()
    {
        (MigrationStatus source, MigrationStatus destination) = await Migrate();
        Assert.That((source, destination), Is.EqualTo((MigrationStatus.Completed, MigrationStatus.Completed)), Reasons);
        Assert.That(Destination.Vm.RunState.IsRunning);
    }

    internal string Reasons() => $"source: {Source.Engine.Query().Error}; destination: {Destination.Engine.Query().Error}";

    public void Dispose()
    {
        Source.Dispose();
        Destination.Dispose();
    }

    private static TestVm Host(bool iommufd, string[] devices, string options, bool incoming) => new(
        new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }], IsIncoming = incoming,
            Devices = [.. devices.Select((path, i) => DeviceOptions.Parse($"vfio-pci,id=d{i},addr={i + 2:x},sysfsdev={path},enable-migration=on,iommufd={(iommufd ? "on" : "off")}{options}"))],
        },
        static b => b.AddPlugin<VfioPlugin>());
}
