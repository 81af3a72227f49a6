using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>The section <c>PATH/vfio</c> of one device (vfio-migration 4): makes a <see cref="VfioSave"/> or a <see cref="VfioLoad"/> per attempt.</summary>
internal sealed class VfioSection(VfioMigration migration) : ISavePrepare, ILoadSetup
{
    private IVfioMigrationProtocol Protocol => migration.Protocol!;

    private bool HasPrecopy => (Protocol.Flags & VfioMigrationFlags.PreCopy) != 0 && Protocol.Version == 2;

    public SaveRoles SavePrepare(SaveContext context)
    {
        migration.ThrowIfLost();
        bool usesThread = CanUseThread(context.HasDataChannels);
        if (migration.Options.MultifdTransfer == true && !usesThread)
            throw new VfioException($"device '{migration.Id}': x-migration-multifd-transfer=on needs protocol v2 and a channel that takes device state (multifd)", Errno.EINVAL);
        if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{migration.Id}' is broken; reset the VM", Errno.EIO);
        bool ack = context.Capabilities.IsOn(MigrationCapability.SwitchoverAck);
        IVfioSaveSession session = Protocol.OpenSave(ack);
        var save = new VfioSave(migration, session, usesThread ? (IVfioThreadedSave)session : null);
        return SaveRoles.Of(save) with { CompleteThread = usesThread ? save : null, SwitchoverAck = ack ? save : null };
    }

    public LoadRoles LoadSetup(LoadContext context)
    {
        // Also for a stream that is only checked: when it has passed, the rest of the VM is overwritten before this device could refuse.
        migration.ThrowIfLost();
        if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{migration.Id}' is broken; reset the VM", Errno.EIO);
        // A stream that is only checked must not reach the device.
        IVfioLoadSession? session = context.ValidateOnly ? null : Protocol.OpenLoad();
        IVfioThreadedLoad? threaded = CanUseThread(context.HasDataChannels) ? (IVfioThreadedLoad?)session : null;
        var load = new VfioLoad(migration, context, session, threaded, HasPrecopy);
        return LoadRoles.Of(load) with { Buffers = threaded is null ? null : load, NeedsSwitchoverAck = HasPrecopy };
    }

    private bool CanUseThread(bool hasChannels) => hasChannels && Protocol.CanUseThreads && migration.Options.MultifdTransfer != false;
}
