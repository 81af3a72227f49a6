using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One attempt to load a device: reads the tags around the data (vfio-migration 4). Both protocols use the same tags, so data of one protocol can
/// reach a device of the other; the device then refuses them, and the load fails with its name.
/// </summary>
internal sealed class VfioLoad : ILoadState, ILoadStateBuffer, ILoadCleanup, IDisposable
{
    private readonly VfioMigration _migration;
    private readonly LoadContext _context;
    private readonly IVfioLoadSession? _session;
    private readonly bool _hasPrecopy;
    private readonly VfioLoadThread? _thread;
    private bool _hasConfig;

    /// <param name="migration">The device.</param>
    /// <param name="context">The attempt.</param>
    /// <param name="session">The protocol's part of the attempt; null when the stream is only checked.</param>
    /// <param name="threaded">The same session when the final state comes over data channels; null otherwise.</param>
    /// <param name="hasPrecopy">The device has first data that can be acknowledged.</param>
    internal VfioLoad(VfioMigration migration, LoadContext context, IVfioLoadSession? session, IVfioThreadedLoad? threaded, bool hasPrecopy)
    {
        (_migration, _context, _session, _hasPrecopy) = (migration, context, session, hasPrecopy);
        if (threaded is not null) _thread = new VfioLoadThread(migration, threaded, ReadConfig, context.Cancel);
    }

    public void LoadStateBuffer(StateBuffer buffer) => _thread!.Insert(buffer);

    public void SwitchoverStart() => _thread!.Start();

    public void NoMoreBuffers() => _thread!.EndInput();

    public void WaitLoaded(CancellationToken cancel) => _thread!.Wait(cancel);

    public void LoadState(QemuFileReader f, int versionId)
    {
        int readAhead = f.ReadAheadBytes;
        try
        {
            LoadRecords(f);
        }
        finally
        {
            f.ReadAheadBytes = readAhead;
        }
    }

    /// <summary>The config record is a device's last: without it the device has nothing, or a part, of what the guest knows.</summary>
    public void ThrowIfIncomplete()
    {
        if (_hasConfig) return;
        throw new IncompatibleStateException($"device '{_migration.Id}': its state never came: the stream ended without the config record of section '{_migration.Path}/vfio'")
        {
            Section = $"{_migration.Path}/vfio", Hint = "give both sides the same devices",
        };
    }

    public void LoadCleanup()
    {
        Dispose();
        _session?.LoadCleanup();
    }

    /// <summary>Ends the thread that writes to the device.</summary>
    public void Dispose() => _thread?.Dispose();

    private void LoadRecords(QemuFileReader f)
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
                    LoadData(f, f.ReadUInt64());
                    break;
                case VfioStreamFlags.DevConfigState when _thread is not null:
                    throw f.Bad("tag of VFIO state", "no config, which comes as a packet", Describe(tag));
                case VfioStreamFlags.DevConfigState:
                    LoadConfig(f);
                    return;
                case VfioStreamFlags.DevInitDataSent:
                    Approve(f);
                    return;
                default:
                    throw f.Bad("tag of VFIO state", "END_OF_STATE, SETUP, DATA, CONFIG or INIT_DATA_SENT", Describe(tag));
            }
        }
    }

    /// <summary>The CONFIG record from a packet. BQL: held.</summary>
    private void ReadConfig(QemuFileReader f)
    {
        ulong tag = f.ReadUInt64();
        if (tag != VfioStreamFlags.DevConfigState) throw f.Bad("tag of a config packet", "CONFIG", Describe(tag));
        LoadConfig(f);
    }

    private void LoadConfig(QemuFileReader f)
    {
        _session?.LoadDone();
        _migration.Config.LoadConfig(f, apply: _session is not null);
        ExpectEnd(f, "config");
        _hasConfig = true;
    }

    private void LoadData(QemuFileReader f, ulong lengthBytes)
    {
        if (lengthBytes > long.MaxValue) throw f.Bad("length of VFIO data", "under 2^63", lengthBytes.ToString());
        if (_session is not null) _session.LoadData(f, lengthBytes);
        else f.Skip((long)lengthBytes);
    }

    private void Approve(QemuFileReader f)
    {
        if (!_hasPrecopy) throw f.Bad("INIT_DATA_SENT", "a device with PRE_COPY", $"'{_migration.Id}', which has {_migration.Protocol!.Flags}");
        if (_context.ApproveSwitchover is not { } approve)
            throw new IncompatibleStateException($"section '{f.Section}': the source waits for an acknowledgement (INIT_DATA_SENT), which is off here")
            {
                Section = f.Section, Offset = f.Position, Hint = "switch capability switchover-ack on at both sides",
            };
        approve();
    }

    private static void ExpectEnd(QemuFileReader f, string what)
    {
        ulong tag = f.ReadUInt64();
        if (tag != VfioStreamFlags.EndOfState) throw f.Bad($"tag after VFIO {what}", "END_OF_STATE", Describe(tag));
    }

    private static string Describe(ulong tag) => tag == VfioStreamFlags.DevConfigLoadReady ? "CONFIG_LOAD_READY, which needs multifd" : $"0x{tag:x16}";
}
