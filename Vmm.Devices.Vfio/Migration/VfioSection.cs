using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The section <c>PATH/vfio</c>: writes and reads the tags around what the protocol moves (spec vfio-migration 4). Both protocols write the same
/// records; what happens when data of one meet a device of the other is up to the device, and fails the load by name.
/// </summary>
internal sealed class VfioSection : ISaveState, ISaveSetup, ISaveLive, ISaveCompleteThread, ILoadState, ILoadStateBuffer, ISwitchoverAck, IDisposable
{
    private readonly VfioMigration _migration;
    private readonly VfioMultifd _multifd;
    private bool _usesThread;
    private bool _usesBuffers;

    /// <summary>Makes the section.</summary>
    internal VfioSection(VfioMigration migration)
    {
        _migration = migration;
        _multifd = new VfioMultifd(this, migration);
    }

    private IVfioMigrationProtocol Protocol => _migration.Protocol!;

    public bool IsActiveIterate => Protocol.IsActiveIterate;

    public bool SwitchoverAckEnabled { get; set; }

    public Action? SwitchoverApproved { get; set; }

    public bool SwitchoverAckNeeded => (Protocol.Flags & VfioMigrationFlags.PreCopy) != 0 && Protocol.Version == 2;

    public int TakeSwitchoverAckRequests() => Protocol.TakeSwitchoverAckRequests();

    public bool UsesCompleteThread
    {
        get => _usesThread;
        set => _usesThread = value && Protocol.CanUseThreads && _migration.Options.MultifdTransfer != false;
    }

    public bool UsesLoadBuffers
    {
        get => _usesBuffers;
        set => _usesBuffers = value && Protocol.CanUseThreads && _migration.Options.MultifdTransfer != false;
    }

    public void Dispose() => _multifd.Dispose();

    public void SavePrepare()
    {
        if (_migration.Options.MultifdTransfer == true && !_usesThread)
            throw new VfioException($"device '{_migration.Id}': x-migration-multifd-transfer=on needs protocol v2 and a channel that takes device state (multifd)", Errno.EINVAL);
        if (Protocol.State == VfioDeviceState.Error) throw new VfioException($"device '{_migration.Id}' is broken; reset the VM", Errno.EIO);
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
        if (Protocol.State != VfioDeviceState.StopCopy) _migration.Config.ReadShadow();
        if (!_usesThread) Protocol.SaveComplete(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public void SaveLiveCompletePrecopyThread(IDeviceStateSink sink, CancellationToken cancel) => _multifd.Save(sink, cancel);

    public void SaveState(QemuFileWriter f)
    {
        if (_usesThread) f.WriteUInt64(VfioStreamFlags.EndOfState);
        else WriteConfig(f);
    }

    /// <summary>The CONFIG record (spec 3.4).</summary>
    /// <param name="f">The stream, or a packet.</param>
    internal void WriteConfig(QemuFileWriter f)
    {
        f.WriteUInt64(VfioStreamFlags.DevConfigState);
        _migration.Config.SaveConfig(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public void SaveCleanup()
    {
        if (Protocol.SaveCleanup() is { } failure) VfioMigrationLog.CleanupFailed(_migration.Logger, _migration.Id, failure.Message);
    }

    public void LoadSetup(QemuFileReader f)
    {
        if (_migration.Services.SaveVm.IsValidating) return;
        Protocol.LoadSetup();
        if (_usesBuffers) _multifd.BeginLoad();
    }

    public void LoadStateBuffer(ReadOnlySpan<byte> buffer) => _multifd.Insert(buffer);

    public void SwitchoverStart() => _multifd.Start();

    public void NoMoreBuffers() => _multifd.EndInput();

    public void WaitLoaded(CancellationToken cancel) => _multifd.Wait(cancel);

    public void LoadState(QemuFileReader f, int versionId)
    {
        int readAhead = f.ReadAheadBytes;
        try
        {
            LoadRecords(f, apply: !_migration.Services.SaveVm.IsValidating);
        }
        finally
        {
            f.ReadAheadBytes = readAhead;
        }
    }

    private void LoadRecords(QemuFileReader f, bool apply)
    {
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
                case VfioStreamFlags.DevConfigState when _usesBuffers && apply:
                    throw f.Bad("tag of VFIO state", "no config, which comes as a packet", Describe(tag));
                case VfioStreamFlags.DevConfigState:
                    LoadConfig(f, apply);
                    return;
                case VfioStreamFlags.DevInitDataSent:
                    Approve(f);
                    return;
                default:
                    throw f.Bad("tag of VFIO state", "END_OF_STATE, SETUP, DATA, CONFIG or INIT_DATA_SENT", Describe(tag));
            }
        }
    }

    public void LoadCleanup()
    {
        _multifd.EndLoad();
        Protocol.LoadCleanup();
    }

    /// <summary>The CONFIG record from a packet. BQL: held.</summary>
    /// <param name="f">The packet's data.</param>
    internal void ReadConfig(QemuFileReader f)
    {
        ulong tag = f.ReadUInt64();
        if (tag != VfioStreamFlags.DevConfigState) throw f.Bad("tag of a config packet", "CONFIG", Describe(tag));
        LoadConfig(f, apply: true);
    }

    private void LoadConfig(QemuFileReader f, bool apply)
    {
        if (apply) Protocol.LoadDone();
        _migration.Config.LoadConfig(f, apply);
        ExpectEnd(f, "config");
    }

    private void LoadData(QemuFileReader f, ulong lengthBytes, bool apply)
    {
        if (lengthBytes > long.MaxValue) throw f.Bad("length of VFIO data", "under 2^63", lengthBytes.ToString());
        if (apply) Protocol.LoadData(f, lengthBytes);
        else f.Skip((long)lengthBytes);
    }

    private void Approve(QemuFileReader f)
    {
        if (!SwitchoverAckNeeded) throw f.Bad("INIT_DATA_SENT", "a device with PRE_COPY", $"'{_migration.Id}', which has {Protocol.Flags}");
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
