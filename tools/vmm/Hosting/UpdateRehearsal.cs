using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.User;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.State;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>
/// Carries a VM of two pages' worth from one side of this process to the other, before the real one is stopped: code that runs for the first
/// time is compiled first, and in an update it would be compiled while the guest stands still.
/// </summary>
internal static class UpdateRehearsal
{
    private const ulong RamBytes = 64 << 10;
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(10);

    /// <summary>Runs both roles once. A failure is reported, not thrown: the update itself does not depend on it.</summary>
    /// <param name="factory">Makes VMs.</param>
    /// <param name="pathPrefix">Two sockets are made at paths that begin with this.</param>
    /// <param name="withDevice">Let it have a vfio-user device too, served from this process.</param>
    /// <returns>What went wrong, or null.</returns>
    public static string? Run(VmFactory factory, string pathPrefix, bool withDevice)
    {
        var main = new MigrationAddress { Transport = MigrationTransport.Unix, Path = pathPrefix + ".main" };
        var cpr = new MigrationAddress { Transport = MigrationTransport.Unix, Path = pathPrefix + ".cpr" };
        try
        {
            using IVfioUserBackend? backend = withDevice ? DeviceTypes.All.Single(static t => t.TypeName == "edu").Create(new DeviceOptions("edu", [])) : null;
            using VfioUserServer? server = backend is null ? null : new VfioUserServer(backend);
            server?.Listen(pathPrefix + ".dev");
            using Vm from = factory.Create(Options(null, server is null ? null : pathPrefix + ".dev"));
            using var limit = new CancellationTokenSource(s_limit);
            from.Cont();
            from.Migration().Parameters.Replace(new MigrationParameters { Mode = MigrationMode.CprTransfer });
            from.Migration().Capabilities.Apply([new(MigrationCapability.ReturnPath, true)]);
            Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(cpr, limit.Token));
            while (!File.Exists(cpr.Path) && !receiving.IsCompleted) limit.Token.WaitHandle.WaitOne(1);
            using CancellationTokenRegistration cancel = limit.Token.Register(from.Migration().Cancel);
            Task<MigrationStatus> outgoing = from.Migration().Migrate(main, cpr);
            using CprTransferReceiver receiver = receiving.GetAwaiter().GetResult();
            using Vm to = factory.Create(Options(receiver.Incoming, server is null ? null : pathPrefix + ".dev"));
            Task<MigrationStatus> incoming = to.Migration().MigrateIncoming(main);
            receiver.Dispose();
            MigrationStatus sent = outgoing.GetAwaiter().GetResult();
            return sent == MigrationStatus.Completed && incoming.Wait(s_limit) ? null : $"{from.Migration().Query().Error}";
        }
        catch (Exception e) when (e is VmmException or OperationCanceledException)
        {
            return e.Message;
        }
    }

    private static VmOptions Options(CprIncoming? cpr, string? device) => new()
    {
        Memory = [new RamBlockOptions { Name = "edu", SizeBytes = RamBytes }, new RamBlockOptions { Name = "ram", SizeBytes = RamBytes }, new RamBlockOptions { Name = "ticks", SizeBytes = RamBytes }],
        Devices =
        [
            new DeviceOptions("pattern", [new("block", "ram")]), new DeviceOptions("scratch", []), new DeviceOptions("ticker", [new("block", "ticks")]),
            .. device is null ? (DeviceOptions[])[] : [new DeviceOptions("vfio-user-pci", [new("id", "dev0"), new("socket", device)]), new DeviceOptions("edu-guest", [])],
        ],
        IsIncoming = cpr is not null,
        Cpr = cpr,
    };
}
