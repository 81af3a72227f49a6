using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Migration;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>A scripted server, guest RAM, and the client that connects them.</summary>
internal sealed class VfioUserRig : IDisposable
{
    internal VfioUserRig(ScriptedVfioUserServer? server = null, Func<VfioUserOptions, VfioUserOptions>? options = null, ulong ramBytes = 1 << 20, bool shared = true)
    {
        Server = (server ?? new ScriptedVfioUserServer()).Start();
        try
        {
            Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = ramBytes, IsShared = shared });
            var plain = new VfioUserOptions { SocketPath = "test", TimeoutMs = 5000 };
            Io = VfioUserDeviceIo.Open(options is null ? plain : options(plain), Memory, Server.ClientSocket);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    internal ScriptedVfioUserServer Server { get; }

    internal GuestMemory Memory { get; } = new();

    internal RamBlock Ram => Memory.Blocks[0];

    internal VfioUserDeviceIo Io { get; } = null!;

    /// <summary>The reason why a VM with this device does not migrate.</summary>
    internal string? BlockedReason()
    {
        TestServices? services = null;
        var collection = new ServiceCollection();
        collection.AddSingleton<IDeviceServices>(_ => services!);
        collection.AddSingleton<VfioMigrationHost>();
        using ServiceProvider provider = collection.BuildServiceProvider();
        services = new TestServices { Scope = provider };
        using (services.Bql.Acquire())
        using (VfioMigration migration = VfioMigration.Realize("dev0", "0000:00:02.0", Io, new FakeConfigState(), new VfioMigrationOptions(), services))
            return migration.BlockedReason;
    }

    public void Dispose()
    {
        Io?.Dispose();
        Server.Dispose();
        Memory.Dispose();
    }
}
