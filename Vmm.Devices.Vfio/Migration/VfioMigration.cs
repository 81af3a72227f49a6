using System.Buffers.Binary;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Vmm.Core;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The migration of one VFIO device: finds out what it can do, registers the <c>/vfio</c> section, the run-state handler, the notifier and the
/// dirty log, or a blocker that says why not (vfio-migration 3.1; QEMU: <c>vfio_migration_realize</c>). BQL: held unless said otherwise.
/// </summary>
internal sealed class VfioMigration : IDisposable
{
    private readonly List<IDisposable> _registrations = [];

    private VfioMigration(string id, string path, IVfioDeviceIo io, IVfioConfigState config, IDeviceServices services, VfioMigrationOptions options)
    {
        (Id, Path, Io, Config, Services, Options) = (id, path, io, config, services, options);
        Logger = services.Loggers.CreateLogger<VfioMigration>();
    }

    /// <summary>The device's id.</summary>
    internal string Id { get; }

    /// <summary>The device's path, <c>0000:00:02.0</c>.</summary>
    internal string Path { get; }

    internal IVfioDeviceIo Io { get; }

    internal IVfioConfigState Config { get; }

    internal IDeviceServices Services { get; }

    internal VfioMigrationOptions Options { get; }

    internal ILogger Logger { get; }

    /// <summary>The protocol; null when the device cannot migrate.</summary>
    internal IVfioMigrationProtocol? Protocol { get; private set; }

    /// <summary>Whether the device logs its own DMA writes.</summary>
    internal bool CanLogDma { get; private set; }

    /// <summary>Why the device cannot migrate, or null.</summary>
    internal string? BlockedReason { get; private set; }

    /// <summary>Probes and registers.</summary>
    /// <returns>To be disposed before the device.</returns>
    /// <exception cref="VfioException"><c>enable-migration=on</c> and the device cannot migrate; or it was found in a state it cannot be brought out of.</exception>
    /// <exception cref="MigrationBlockedException">A blocker is needed and a migration runs.</exception>
    internal static VfioMigration Realize(string id, string path, IVfioDeviceIo io, IVfioConfigState config, VfioMigrationOptions options, IDeviceServices services)
    {
        var migration = new VfioMigration(id, path, io, config, services, options);
        try
        {
            migration.Probe();
            return migration;
        }
        catch
        {
            migration.Dispose();
            throw;
        }
    }

    /// <summary>Whether the device is being handed to another process as it is, so that its migration state must not change (vfio-migration 7.7).</summary>
    internal Func<bool> IsBypassed { get; set; } = static () => false;

    /// <summary>Called when the device came from another process, in an unknown state.</summary>
    internal void ReadStateAfterCpr() => Protocol?.ReadState();

    /// <summary>Throws if the device is gone: nobody has its state, and nobody takes one.</summary>
    /// <exception cref="VfioException">Names the device and the reason.</exception>
    internal void ThrowIfLost()
    {
        if (Io.LostReason is { } reason)
            throw new VfioException($"device '{Id}' ({Io.Name}) is gone: {reason.Message}", reason.Errno, reason) { Hint = "a reset of the VM attaches it to a new server" };
    }

    /// <summary>Called when the device's owner has reset it.</summary>
    /// <param name="isDone">False when the device refused: its state is what it says, or unknown.</param>
    internal void OnDeviceReset(bool isDone)
    {
        if (isDone) Protocol?.OnReset();
        else Protocol?.OnResetFailed();
    }

    public void Dispose()
    {
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
        Protocol?.Dispose();
    }

    private void Probe()
    {
        if (Options.Enable == VfioEnableMigration.Off) { Block("migration is disabled for it (enable-migration=off)"); return; }
        if (Io.NoMigrationReason is { } cannotAsk) { Block(cannotAsk); return; }
        (IVfioMigrationProtocol? protocol, string reason) = FindProtocol();
        if (protocol is null) { Block(reason); return; }
        Protocol = protocol;
        // A device that another process hands over may be stopped with its VM; ReadStateAfterCpr asks for its state.
        if (!Services.CprFds.IsIncoming) LeaveLeftOverState();
        CanLogDma = Options.DeviceDirtyPageTracking
            && Io.DeviceFeature(VfioDeviceFeature.DmaLoggingStart, VfioFeatureOp.Probe | VfioFeatureOp.Set, []) == Errno.None;
        if (!CheckDirtyTracking()) return;
        var host = Services.Scope.GetRequiredService<VfioMigrationHost>();
        _registrations.Add(host.Add(this));
        Services.DeviceTransfer.IsUsed = true;
        protocol.StateChanged += OnStateChanged;
        _registrations.Add(Services.SaveVm.Register(
            new SaveVmRegistration { IdStr = $"{Path}/vfio", InstanceId = 0, VersionId = 1, MinimumVersionId = 1 }, SaveVmHandlers.Of(new VfioSection(this)) with { IsActive = () => !IsBypassed() }));
        _registrations.Add(Services.RunState.Register(new VfioRunStateHandler(this), VfioRunStateHandler.Priority));
        _registrations.Add(Services.Notifiers.Add(OnMigration));
        VfioMigrationLog.MigrationReady(Logger, Id, protocol.Version, protocol.Flags.ToString(), CanLogDma);
    }

    /// <summary>Feature MIGRATION, else a v1 region, else the reason (vfio-migration 3.1 and 5).</summary>
    private (IVfioMigrationProtocol? Protocol, string Reason) FindProtocol()
    {
        Span<byte> data = stackalloc byte[8];
        data.Clear();
        Errno errno = Io.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, data);
        if (errno == Errno.ENOTTY)
        {
            VfioRegionInfo? region = FindRegion();
            if (region is null) return (null, "it does not support migration");
            return region.SizeBytes <= 32 ? (null, $"its migration region has {region.SizeBytes} bytes and no room for data") : (new VfioMigrationV1(Io, Config, region, Services.DeviceTransfer), "");
        }
        if (errno != Errno.None) return (null, $"it failed to say whether it supports migration ({errno})");
        var flags = (VfioMigrationFlags)BinaryPrimitives.ReadUInt64LittleEndian(data);
        if ((flags & VfioMigrationFlags.StopCopy) == 0) return (null, $"its migration lacks STOP_COPY (flags 0x{(ulong)flags:x})");
        bool infoV2 = false;
        if ((flags & VfioMigrationFlags.PreCopy) != 0)
        {
            errno = Io.DeviceFeature(VfioDeviceFeature.MigPrecopyInfoV2, VfioFeatureOp.Set, []);
            if (errno is not (Errno.None or Errno.ENOTTY)) return (null, $"it failed to switch on precopy info v2 ({errno})");
            infoV2 = errno == Errno.None;
        }
        return (new VfioMigrationV2(Io, Config, flags, infoV2, Services.DeviceTransfer) { AssumedStopCopyBytes = Options.StopCopyBytes }, "");
    }

    private VfioRegionInfo? FindRegion()
    {
        for (uint i = VfioPciRegion.FirstDeviceSpecific; i < Io.Info.RegionCount; i++)
        {
            VfioRegionInfo info = Io.GetRegionInfo(i);
            if (info is { Type: VfioPciRegion.MigrationType, Subtype: VfioPciRegion.MigrationSubtype }) return info;
        }
        return null;
    }

    /// <summary>Resets a device that an earlier user left in another state than RUNNING (vfio-migration 1.7).</summary>
    private void LeaveLeftOverState()
    {
        if (Protocol!.Version != 2 || Io.GetMigrationState(out VfioDeviceState state) != Errno.None || state == VfioDeviceState.Running) return;
        Errno errno = Io.Reset();
        if (errno == Errno.None) errno = Io.GetMigrationState(out state);
        if (errno != Errno.None || state != VfioDeviceState.Running)
            throw new VfioException($"device '{Io.Name}' was left in {state.ToName()} by somebody else and a reset does not help ({errno})", Errno.EIO);
        VfioMigrationLog.LeftOverState(Logger, Id);
    }

    /// <summary>
    /// Blocks migration when nothing logs DMA writes, unless <c>enable-migration=on</c> asks for it: every pass would send all RAM again
    /// (vfio-migration 3.1.6).
    /// </summary>
    private bool CheckDirtyTracking()
    {
        if (CanLogDma) return true;
        if (!Io.Container.CanLogDirty)
        {
            if (Options.Enable == VfioEnableMigration.On)
            {
                VfioMigrationLog.NoDirtyTracking(Logger, Id);
                return true;
            }
            Block("neither it nor its IOMMU can log DMA writes (enable-migration=on migrates it all the same, sending all RAM while it is stopped)");
            return false;
        }
        ulong most = Io.Container.MaxDirtyBitmapBytes;
        ulong bytes = Services.Memory.Blocks.Count == 0 ? 0 : Services.Memory.Blocks.Max(static b => b.SizeBytes);
        if (most == 0 || bytes / 4096 / 8 <= most) return true;
        Block($"a RAM block of {bytes} bytes is more than one dirty bitmap of its IOMMU describes ({most} bytes)");
        return false;
    }

    private void Block(string why)
    {
        Protocol?.Dispose();
        Protocol = null;
        BlockedReason = $"device '{Id}' ({Io.Name}): {why}";
        if (Options.Enable == VfioEnableMigration.On) throw new VfioException($"{BlockedReason}, and enable-migration=on was asked for", Errno.EOPNOTSUPP);
        _registrations.Add(Services.Blockers.Add(BlockedReason, MigrationModes.Normal));
        VfioMigrationLog.MigrationBlocked(Logger, BlockedReason);
    }

    private void OnStateChanged(VfioDeviceState state)
    {
        VfioMigrationLog.StateChanged(Logger, Id, state.ToName());
        if (Options.MigrationEvents && state != VfioDeviceState.Error) RaiseEvent(state.ToEventName());
    }

    /// <summary>QMP event VFIO_MIGRATION.</summary>
    /// <param name="state">Name of the state.</param>
    internal void RaiseEvent(string state) =>
        Services.Events.Raise("VFIO_MIGRATION", new("device-id", Id), new("qom-path", $"/machine/peripheral/{Id}"), new("device-state", state));

    /// <summary>
    /// Takes a device out of the states in which it is saved, at the end of an attempt: else the next one would get the rest of the data of this one. Most
    /// ways out of an attempt have done it before.
    /// </summary>
    /// <returns>Why the device could not be left in good order, or null.</returns>
    internal static VfioException? LeaveSaving(IVfioMigrationProtocol protocol)
    {
        VfioDeviceState? next = protocol.State switch
        {
            VfioDeviceState.PreCopy => VfioDeviceState.Running,
            VfioDeviceState.PreCopyP2P => VfioDeviceState.RunningP2P,
            VfioDeviceState.StopCopy => VfioDeviceState.Stop,
            _ => null,
        };
        try
        {
            if (next is { } state) protocol.SetState(state, VfioDeviceState.Error);
            return null;
        }
        catch (VfioException e)
        {
            return e;
        }
    }

    /// <summary>
    /// Takes the device out of the migration states after a failed or cancelled migration, before the guest runs (vfio-migration 3.9). With the VM
    /// stopped it goes to STOP, because a paused VM must not do DMA; the start of the VM moves it to RUNNING.
    /// </summary>
    private void OnMigration(MigrationEvent what)
    {
        if (what != MigrationEvent.PrecopyFailed || Protocol is not { } protocol || Io.LostReason is not null) return;
        bool runs = Services.RunState.IsRunning;
        if (VfioStateArcs.HasData(protocol.State)) protocol.SetState(runs ? VfioDeviceState.Running : VfioDeviceState.Stop, VfioDeviceState.Error);
    }
}
