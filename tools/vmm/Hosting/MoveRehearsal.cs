using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.User;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Qmp;
using Vmm.Migration.State;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Cli.Hosting;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// Carries a VM of two pages' worth from one side of this process to the other, before the real one is stopped: code that runs for the first
/// time is compiled first, and in an update or a migration it would be compiled while the guest stands still.
/// </summary>
internal static class MoveRehearsal
{
    private const ulong RamBytes = 64 << 10, BootBytes = 3 << 20;
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(10), s_learning = TimeSpan.FromSeconds(1);

    /// <summary>Runs both roles once. A failure is reported, not thrown: the update itself does not depend on it.</summary>
    /// <param name="factory">Makes VMs.</param>
    /// <param name="pathPrefix">Two sockets are made at paths that begin with this.</param>
    /// <param name="real">The VM that is to be carried: if it has a vfio-user device, so does this one, served from this process; and CPUs if it has.</param>
    /// <returns>What went wrong, or null.</returns>
    public static string? Run(VmFactory factory, string pathPrefix, VmOptions real)
    {
        bool withDevice = real.Devices.Any(static d => d.TypeName == "vfio-user-pci");
        var main = new MigrationAddress { Transport = MigrationTransport.Unix, Path = pathPrefix + ".main" };
        var cpr = new MigrationAddress { Transport = MigrationTransport.Unix, Path = pathPrefix + ".cpr" };
        try
        {
            using IVfioUserBackend? backend = withDevice ? DeviceTypes.All.Single(static t => t.TypeName == "edu").Create(new DeviceOptions("edu", [])) : null;
            using VfioUserServer? server = backend is null ? null : new VfioUserServer(backend);
            server?.Listen(pathPrefix + ".dev");
            using Vm from = factory.Create(Options(real, null, server is null ? null : pathPrefix + ".dev"));
            // Listens nowhere, but is told of every change as the real one is.
            using QmpServer fromQmp = from.Services.GetRequiredService<QmpServer>();
            using var limit = new CancellationTokenSource(s_limit);
            // It runs no longer than it takes to learn its functions, and again before the stop: on a busy host its CPU is wanted here.
            from.Cont();
            if (real.HasCpus && server is not null) SpinWait.SpinUntil(() => limit.IsCancellationRequested || BusyGuest.Read(from.Memory).Interrupts > 0, s_learning);
            from.Stop();
            from.Migration().Parameters.Replace(new MigrationParameters { Mode = MigrationMode.CprTransfer });
            from.Migration().Capabilities.Apply([new(MigrationCapability.ReturnPath, true)]);
            Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(cpr, limit.Token));
            while (!File.Exists(cpr.Path) && !receiving.IsCompleted) limit.Token.WaitHandle.WaitOne(1);
            using CancellationTokenRegistration cancel = limit.Token.Register(from.Migration().Cancel);
            Task<MigrationStatus> outgoing = from.Migration().Migrate(main, cpr);
            using CprTransferReceiver receiver = receiving.WaitAndUnwrapException();
            using Vm to = factory.Create(Options(real, receiver.Incoming, server is null ? null : pathPrefix + ".dev"));
            using QmpServer toQmp = to.Services.GetRequiredService<QmpServer>();
            Task<MigrationStatus> incoming = to.Migration().MigrateIncoming(main);
            from.Cont();
            receiver.Dispose();
            MigrationStatus sent = outgoing.WaitAndUnwrapException();
            return sent == MigrationStatus.Completed && incoming.Wait(s_limit) ? null : $"{from.Migration().Query().Error}";
        }
        catch (Exception e) when (e is VmmException or OperationCanceledException)
        {
            return e.Message;
        }
    }

    private static VmOptions Options(VmOptions real, CprIncoming? cpr, string? device) => new()
    {
        Memory =
        [
            .. real.HasCpus ? (RamBlockOptions[])[Block("boot", BootBytes)] : [], Block("edu", RamBytes), Block("ram", RamBytes), Block("ticks", RamBytes),
        ],
        Devices =
        [
            new DeviceOptions("pattern", [new("block", "ram")]), new DeviceOptions("scratch", []), new DeviceOptions("ticker", [new("block", "ticks")]),
            .. device is null ? (DeviceOptions[])[] : [new DeviceOptions("vfio-user-pci", [new("id", "dev0"), new("socket", device)])],
            // With CPUs, these drive the function.
            .. device is null || real.HasCpus ? (DeviceOptions[])[] : [new DeviceOptions("edu-guest", [])],
        ],
        Accelerator = real.HasCpus ? real.Accelerator : "none",
        Cpus = real.HasCpus ? Math.Min(real.Cpus, 2) : 1,
        DirtyRingEntries = real.DirtyRingEntries,
        Kernel = real.HasCpus ? new KernelOptions { KernelPath = "busy", Image = BusyGuest.Build([BootBytes]) } : null,
        IsIncoming = cpr is not null,
        Cpr = cpr,
    };

    private static RamBlockOptions Block(string name, ulong bytes) => new() { Name = name, SizeBytes = bytes };
}
