using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// Serves any PCI function of the core, one that was written for a VM here, to another VMM over vfio-user: its registers and configuration
/// space by the PCI seam, its DMA into the client's memory, its interrupts by the client's eventfds, its state from the same sections that a
/// migration of a VM saves. The function lives in a VM of its own, which runs while the migration state is one that runs. A state is loaded
/// into a second such VM, which takes the first one's place when all of it is good (vfio-user S-53): a failed load leaves nothing.
/// </summary>
public sealed partial class PciDeviceBackend : IVfioUserBackend
{
    private const ulong DefaultLimitBytes = 64UL << 20;

    private readonly Action<VmmBuilder> _configure;
    private readonly Func<DeviceOptions> _options;
    private readonly VfioUserDmaGate _gate = new();
    private readonly uint[] _irqCounts = new uint[VfioUserIrqs.IndexCount];
    private VfioUserHost _host = null!;
    private HostedVm _vm;

    /// <summary>Makes the device.</summary>
    /// <param name="typeName">Type in its state; a stream of another type is refused.</param>
    /// <param name="configure">Adds the plugin of the device type.</param>
    /// <param name="options">Type and options, the same at each call: made once here, and once for each state that is loaded.</param>
    /// <param name="hasP2P">Offer the P2P states too, in which it is stopped: several devices of one VM move together only then.</param>
    /// <exception cref="ConfigurationException">The device refuses its options, is not a PCI function, or is not alone.</exception>
    public PciDeviceBackend(string typeName, Action<VmmBuilder> configure, Func<DeviceOptions> options, bool hasP2P = false)
    {
        ArgumentNullException.ThrowIfNull(configure);
        ArgumentNullException.ThrowIfNull(options);
        (TypeName, _configure, _options) = (typeName, configure, options);
        _vm = new HostedVm(configure, options(), isIncoming: false);
        PciDevice function = _vm.Function;
        Regions = [.. Enumerable.Range(0, PciBar.Rom + 1).Select(function.Bar).OfType<PciBar>()
            .Select(static b => new VfioUserRegion { Index = (uint)b.Number, SizeBytes = b.SizeBytes, IsWritable = b.Number != PciBar.Rom }),
            new VfioUserRegion { Index = VfioPciRegion.Config, SizeBytes = (ulong)function.Config.SizeBytes }];
        _irqCounts[VfioPciIrq.Intx] = function.Config.Bytes[PciRegisters.InterruptPin] == 0 ? 0u : 1;
        _irqCounts[VfioPciIrq.Msi] = (uint)(function.Msi?.MaxVectors ?? 0);
        _irqCounts[VfioPciIrq.Msix] = (uint)(function.Msix?.Vectors ?? 0);
        bool blocked = _vm.Vm.Services.GetService(typeof(MigrationBlockers)) is MigrationBlockers blockers && blockers.Reasons(MigrationMode.Normal).Count > 0;
        bool migratable = !blocked && _vm.Vm.SaveVm.Entries().All(static e => e.VmState is not { IsMigratable: false });
        MigrationFlags = migratable ? VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy | (hasP2P ? VfioMigrationFlags.P2P : 0) : VfioMigrationFlags.None;
    }

    /// <inheritdoc/>
    public string TypeName { get; }

    /// <inheritdoc/>
    public IReadOnlyList<VfioUserRegion> Regions { get; }

    /// <inheritdoc/>
    public VfioMigrationFlags MigrationFlags { get; }

    /// <summary>Most bytes of its state; more is refused on both sides (vfio-user S-56).</summary>
    public ulong LimitBytes { get; init; } = DefaultLimitBytes;

    /// <summary>The function as it is now; another object after a state was loaded. For tests and management; its BQL is its host's.</summary>
    public PciDevice Function => _vm.Function;

    /// <inheritdoc/>
    public uint GetIrqCount(uint index) => _irqCounts[index];

    /// <inheritdoc/>
    public void Realize(VfioUserHost host)
    {
        _host = host;
        _vm.Connect(host, _gate);
        FollowBusMaster();
        _vm.Vm.Cont();
    }

    /// <inheritdoc/>
    public ValueTask<Errno> Quiesce() => _gate.Close();

    /// <inheritdoc/>
    public void Unquiesce() => _gate.Open();

    /// <inheritdoc/>
    public ValueTask<Errno> Reset(VfioUserResetReason reason) => OnVm(
        vm =>
        {
            vm.Reset();
            vm.Cont();
            _host.Irqs.ClearPending();
            FollowBusMaster();
        },
        opensGate: true);

    /// <inheritdoc/>
    public void ClientLost()
    {
        // Its threads find no memory; everything else is the device's.
    }

    /// <inheritdoc/>
    public ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to)
    {
        bool ran = Runs(from), runs = Runs(to);
        if (ran && !runs) return OnVm(Stop, opensGate: true);
        // On a start devices take what they share with their other end, and one that cannot have it stays stopped (vfio-user S-52).
        if (runs && !ran) return OnVm(static vm => vm.Cont());
        MigrationEvent? what = (from, to) switch
        {
            (VfioDeviceState.Running, VfioDeviceState.PreCopy) or (VfioDeviceState.RunningP2P, VfioDeviceState.PreCopyP2P) or (VfioDeviceState.Stop, VfioDeviceState.StopCopy) => MigrationEvent.PrecopySetup,
            (VfioDeviceState.PreCopy, VfioDeviceState.Running) or (VfioDeviceState.PreCopyP2P, VfioDeviceState.RunningP2P) => MigrationEvent.PrecopyFailed,
            (VfioDeviceState.StopCopy, VfioDeviceState.Stop) => MigrationEvent.PrecopyDone,
            _ => null,
        };
        return what is { } moment ? OnVm(vm => Notify(vm, moment)) : ValueTask.FromResult(Errno.None);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _gate.Dispose();
        _vm.Dispose();
    }

    private static bool Runs(VfioDeviceState state) => state is VfioDeviceState.Running or VfioDeviceState.PreCopy;

    /// <summary>A device that fails to stop is refused its stop, and runs.</summary>
    private static void Stop(Vm vm)
    {
        try
        {
            vm.Stop();
        }
        catch (DeviceStateException)
        {
            vm.Cont();
            throw;
        }
    }

    private static void Notify(Vm vm, MigrationEvent what)
    {
        using (vm.Bql.Acquire()) (vm.Services.GetService(typeof(MigrationNotifiers)) as MigrationNotifiers)?.Notify(what, MigrationMode.Normal);
    }

    /// <summary>
    /// Changes the VM's state beside the session's thread, which delivers answers to the device's DMA meanwhile: a device waits for its own
    /// transfers when it stops. For that the gate is opened; no mapping changes now. What it begins when it starts waits until memory is there.
    /// </summary>
    private async ValueTask<Errno> OnVm(Action<Vm> change, bool opensGate = false)
    {
        Vm vm = _vm.Vm;
        LetSaveGoOn();
        if (opensGate) _gate.Open();
        try
        {
            await WorkerThread.Run("vfu-state", () => change(vm));
            return Errno.None;
        }
        catch (VmmException e)
        {
            return e.Errno == Errno.None ? Errno.EIO : e.Errno;
        }
        finally
        {
            if (opensGate) await _gate.Close();
        }
    }

    private void FollowBusMaster() => _host.Dma.IsBusMaster = _vm.Function.IsBusMaster;
}
