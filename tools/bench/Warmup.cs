using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Bench;

/// <summary>Runs a small migration of the same kind in this process first, so that the measurement does not include JIT compilation.</summary>
internal static class Warmup
{
    internal static void Run()
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-bench-");
        try
        {
            string a = Path.Combine(folder.FullName, "a"), b = Path.Combine(folder.FullName, "b"), to = Path.Combine(folder.FullName, "to");
            using IVfioUserBackend first = new DmaTestType().Create(DeviceOptions.Parse("dma-test,seed=1,precopy=off,state-size=16M"));
            using IVfioUserBackend second = new DmaTestType().Create(DeviceOptions.Parse("dma-test,seed=2,precopy=off,state-size=16M"));
            using var serverA = new VfioUserServer(first);
            using var serverB = new VfioUserServer(second);
            serverA.Listen(a);
            serverB.Listen(b);
            var services = new ServiceCollection();
            services.AddVmm().AddMigration().AddPlugin<VfioPlugin>();
            using ServiceProvider provider = services.BuildServiceProvider();
            using Vm destination = Make(provider, b, incoming: true), source = Make(provider, a, incoming: false);
            source.Cont();
            Task<MigrationStatus> incoming = destination.Migration().MigrateIncoming(MigrationAddress.Parse($"unix:{to}"));
            MigrationStatus end = source.Migration().Migrate(MigrationAddress.Parse($"unix:{to}")).Result;
            if (end != MigrationStatus.Completed || incoming.Result != MigrationStatus.Completed) throw new InvalidOperationException($"warm-up: {source.Migration().Query().Error}");
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static Vm Make(ServiceProvider provider, string socket, bool incoming)
    {
        Vm vm = provider.GetRequiredService<VmFactory>().Create(new VmOptions
        {
            IsIncoming = incoming, Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }],
            Devices = [DeviceOptions.Parse($"vfio-user-pci,socket={socket},x-mig-chunk=1M")],
        });
        IMigrationEngine engine = vm.Migration();
        engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        engine.Parameters = engine.Parameters with { MaxBandwidthBytesPerSecond = 0, DowntimeLimitMs = 600_000 };
        return vm;
    }
}
