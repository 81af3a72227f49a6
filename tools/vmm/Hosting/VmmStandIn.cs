using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Migration.Qmp;
using Vmm.Migration.Update;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>
/// The stand-in for a VM of <c>vmm run</c> in a rehearsal. It has a busy guest, a QMP server, vmm's own devices, and, if the real VM has one, a vfio-user
/// device that this process serves.
/// </summary>
internal sealed class VmmStandIn : MoveStandIn
{
    private const ulong RamBytes = 64 << 10, BootBytes = 3 << 20;
    private readonly IVfioUserBackend? _backend;
    private readonly VfioUserServer? _server;

    internal VmmStandIn(VmOptions real, string socketPath) : base(real)
    {
        bool isServed = real.Devices.Any(static d => d.TypeName == "vfio-user-pci");
        Options = base.Options with
        {
            Memory = [.. real.HasCpus ? (RamBlockOptions[])[Block("boot", BootBytes)] : [], Block("edu", RamBytes), Block("ram", RamBytes), Block("ticks", RamBytes)],
            Devices =
            [
                new DeviceOptions("pattern", [new("block", "ram")]), new DeviceOptions("scratch", []), new DeviceOptions("ticker", [new("block", "ticks")]),
                .. isServed ? (DeviceOptions[])[new DeviceOptions("vfio-user-pci", [new("id", "dev0"), new("socket", socketPath)])] : [],
                // If the VM has CPUs, its guest drives the function instead.
                .. isServed && !real.HasCpus ? (DeviceOptions[])[new DeviceOptions("edu-guest", [])] : [],
            ],
            Kernel = real.HasCpus ? new KernelOptions { KernelPath = "busy", Image = BusyGuest.Build([BootBytes]) } : null,
        };
        if (!isServed) return;
        _backend = DeviceTypes.All.Single(static t => t.TypeName == "edu").Create(new DeviceOptions("edu", []));
        _server = new VfioUserServer(_backend);
        try
        {
            _server.Listen(socketPath);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public override VmOptions Options { get; }

    /// <summary>Makes a QMP server that listens on no socket, but handles every change as the real VM's server does. It ends with the VM.</summary>
    public override void OnCreated(Vm vm) => vm.Services.GetRequiredService<QmpServer>();

    public override void WaitUntilUsed(Vm vm, CancellationToken limit)
    {
        // Poll, because a counter in guest memory raises no event.
        if (_server is not null && Options.HasCpus) SpinWait.SpinUntil(() => limit.IsCancellationRequested || BusyGuest.Read(vm.Memory).Interrupts > 0);
    }

    protected override void Dispose(bool disposing)
    {
        _server?.Dispose();
        _backend?.Dispose();
        base.Dispose(disposing);
    }

    private static RamBlockOptions Block(string name, ulong bytes) => new() { Name = name, SizeBytes = bytes };
}
