using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Diagnostics;
using Vmm.Devices.Vfio.Io;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The section <c>PATH/vfio</c>: writes and reads the tags around what the protocol moves (spec vfio-migration 4). Both protocols write the same
/// records; what happens when data of one meet a device of the other is up to the device, and fails the load by name.
/// </summary>
/// <param name="migration">The device.</param>
internal sealed class VfioSection(VfioMigration migration) : ISaveState, ISaveSetup, ISaveLive, ILoadState, ISwitchoverAck
{
    private IVfioMigrationProtocol Protocol => migration.Protocol!;

    public bool IsActiveIterate => Protocol.IsActiveIterate;

    public bool SwitchoverAckEnabled { get; set; }

    public Action? SwitchoverApproved { get; set; }

    public bool SwitchoverAckNeeded => (Protocol.Flags & VfioMigrationFlags.PreCopy) != 0 && Protocol.Version == 2;

    public int TakeSwitchoverAckRequests() => Protocol.TakeSwitchoverAckRequests();

    public void SavePrepare()
    {
        if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{migration.Id}' is broken; reset the VM", Errno.EIO);
    }

    public void SaveSetup(QemuFileWriter f, CancellationToken cancel)
    {
        f.WriteUInt64(VfioStreamFlags.DevSetupState);
        Protocol.SaveSetup(SwitchoverAckEnabled);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public PendingBytes EstimatePending() => Protocol.EstimatePending();

    public PendingBytes ExactPending() => Protocol.ExactPending();

    public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
    {
        (SaveProgress progress, ulong endTag) = Protocol.SaveIterate(f);
        f.WriteUInt64(endTag);
        return progress;
    }

    public void SaveLiveCompletePrecopy(QemuFileWriter f)
    {
        if (Protocol.State != VfioDeviceState.StopCopy) migration.Config.ReadShadow();
        Protocol.SaveComplete(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public void SaveState(QemuFileWriter f)
    {
        f.WriteUInt64(VfioStreamFlags.DevConfigState);
        migration.Config.SaveConfig(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public void SaveCleanup()
    {
        if (Protocol.SaveCleanup() is { } failure) VfioMigrationLog.CleanupFailed(migration.Logger, migration.Id, failure.Message);
    }

    public void LoadSetup(QemuFileReader f)
    {
        if (!migration.Services.SaveVm.IsValidating) Protocol.LoadSetup();
    }

    public void LoadState(QemuFileReader f, int versionId)
    {
        bool apply = !migration.Services.SaveVm.IsValidating;
        while (true)
        {
            ulong tag = f.ReadUInt64();
            switch (tag)
            {
                case VfioStreamFlags.EndOfState:
                    return;
                case VfioStreamFlags.DevSetupState:
                    ExpectEnd(f, "setup");
                    return;
                case VfioStreamFlags.DevDataState:
                    LoadData(f, f.ReadUInt64(), apply);
                    break;
                case VfioStreamFlags.DevConfigState:
                    if (apply) Protocol.LoadDone();
                    migration.Config.LoadConfig(f, apply);
                    ExpectEnd(f, "config");
                    return;
                case VfioStreamFlags.DevInitDataSent:
                    Approve(f);
                    return;
                default:
                    throw f.Bad("tag of VFIO state", "END_OF_STATE, SETUP, DATA, CONFIG or INIT_DATA_SENT", Describe(tag));
            }
        }
    }

    public void LoadCleanup() => Protocol.LoadCleanup();

    private void LoadData(QemuFileReader f, ulong lengthBytes, bool apply)
    {
        if (lengthBytes > long.MaxValue) throw f.Bad("length of VFIO data", "under 2^63", lengthBytes.ToString());
        if (apply) Protocol.LoadData(f, lengthBytes);
        else f.Skip((long)lengthBytes);
    }

    private void Approve(QemuFileReader f)
    {
        if (!SwitchoverAckNeeded) throw f.Bad("INIT_DATA_SENT", "a device with PRE_COPY", $"'{migration.Id}', which has {Protocol.Flags}");
        if (SwitchoverApproved is not { } approved)
            throw new IncompatibleStateException($"section '{f.Section}': the source waits for an acknowledgement (INIT_DATA_SENT), which is off here")
            {
                Section = f.Section, Offset = f.Position, Hint = "switch capability switchover-ack on at both sides",
            };
        approved();
    }

    private static void ExpectEnd(QemuFileReader f, string what)
    {
        ulong tag = f.ReadUInt64();
        if (tag != VfioStreamFlags.EndOfState) throw f.Bad($"tag after VFIO {what}", "END_OF_STATE", Describe(tag));
    }

    private static string Describe(ulong tag) => tag == VfioStreamFlags.DevConfigLoadReady ? "CONFIG_LOAD_READY, which needs multifd" : $"0x{tag:x16}";
}
