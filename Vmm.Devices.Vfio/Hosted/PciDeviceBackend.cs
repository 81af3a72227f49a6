using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// Serves any PCI function that was written for a VM of this core to another VMM over vfio-user: the client accesses its registers and
/// configuration space, it does DMA to the client's memory and signals the client's eventfds, and its state has the same sections as in a
/// migration of a VM. The function lives in a VM of its own, which runs in the migration states that run. A load fills a second such VM, which
/// replaces the first one only when all of the state is good (vfio-user S-53); a failed load therefore changes nothing. Threads: as for
/// <see cref="IVfioUserBackend"/>; it takes the BQL of its own VM where the function needs it.
/// </summary>
public sealed partial class PciDeviceBackend : IVfioUserBackend
{

    private readonly Action<VmmBuilder> _configure;
    private readonly Func<DeviceOptions> _options;
    private readonly VfioUserDmaGate _gate = new();
    private readonly uint[] _irqCounts = new uint[VfioUserIrqs.IndexCount];
    private VfioUserHost _host = null!;
    private HostedVm _vm;
    private ulong _stateBytes;

    /// <summary>Makes the device.</summary>
    /// <param name="typeName">Device type that its state names; a state of another type is refused.</param>
    /// <param name="configure">Adds the plugin of the device type.</param>
    /// <param name="options">Makes the device's type and options. Called once now and once for each load; must give the same each time.</param>
    /// <param name="hasP2P">Offer the P2P states too, in which the device is stopped. A client needs them to migrate several devices of one VM.</param>
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
        _stateBytes = HostedStream.DeclaredBytes(_vm.Vm);
        MigrationFlags = migratable ? VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy | (hasP2P ? VfioMigrationFlags.P2P : 0) : VfioMigrationFlags.None;
    }

    /// <inheritdoc/>
    public string TypeName { get; }

    /// <inheritdoc/>
    public IReadOnlyList<VfioUserRegion> Regions { get; }

    /// <inheritdoc/>
    public VfioMigrationFlags MigrationFlags { get; }

    /// <summary>Most bytes of the device's state; a larger one is refused when saving and when loading (vfio-user S-56).</summary>
    public ulong LimitBytes { get; init; } = VfioUserLimits.StateBytes;

    /// <summary>The present function, for tests and management; each load replaces it. Access it with the BQL of its own VM held.</summary>
    public PciDevice Function => _vm.Function;

    /// <inheritdoc/>
    /// <remarks>The length of the last save; before the first one, of what the device declares.</remarks>
    public ulong? EstimateStateBytes() => Interlocked.Read(ref _stateBytes);

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
        // Only memory goes: registers and state stay with the device.
    }

    /// <inheritdoc/>
    public ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to)
    {
        bool ran = Runs(from), runs = Runs(to);
        if (ran && !runs) return OnVm(Stop, opensGate: true);
        // A device acquires what it shares with its other end when it starts; when it cannot, it stays stopped (vfio-user S-52).
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

    /// <summary>Stops the VM; when a device fails to stop, the VM runs on and the client gets the error.</summary>
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
    /// Changes the VM's state on another thread, so that the session's thread can deliver answers to DMA meanwhile. A device that stops waits for
    /// its own transfers, so a stop opens the gate; no mapping can change now. A start keeps the gate closed: new DMA waits for the end of the quiesce.
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
