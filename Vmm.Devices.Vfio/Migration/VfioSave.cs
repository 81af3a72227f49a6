using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One attempt to save a device: writes the tags around the data (vfio-migration 4). Both protocols write the same records.
/// </summary>
/// <param name="migration">The device.</param>
/// <param name="session">The protocol's part of the attempt.</param>
/// <param name="threaded">
/// The same session when the final state goes over data channels (vfio-migration 3.7), so that END and FULL sections are empty; null otherwise.
/// </param>
internal sealed class VfioSave(VfioMigration migration, IVfioSaveSession session, IVfioThreadedSave? threaded) : ISaveSetup, ISaveLive, ISaveState, ISaveCompleteThread, ISwitchoverAck, ISaveCleanup
{
    /// <summary>Longest config record: a PCI express function's, with a full MSI-X table.</summary>
    internal const int MaxConfigBytes = 1 << 17;

    public bool IsActiveIterate => session.IsActiveIterate;

    public int TakeSwitchoverAckRequests() => session.TakeSwitchoverAckRequests();

    public void SaveSetup(QemuFileWriter f)
    {
        f.WriteUInt64(VfioStreamFlags.DevSetupState);
        session.SaveSetup();
        if (session.IsSizeUnknown) VfioMigrationLog.SizeUnknown(migration.Logger, migration.Id, migration.Options.StopCopyBytes >> 20);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    public PendingBytes EstimatePending()
    {
        // The loop that asks would otherwise go on until it comes to the device's data.
        migration.ThrowIfLost();
        return session.EstimatePending();
    }

    public PendingBytes ExactPending()
    {
        migration.ThrowIfLost();
        return session.ExactPending();
    }

    public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
    {
        (SaveProgress progress, ulong endTag) = session.SaveIterate(f);
        f.WriteUInt64(endTag);
        return progress;
    }

    public void SaveLiveCompletePrecopy(QemuFileWriter f)
    {
        migration.ThrowIfLost();
        if (migration.Protocol!.State != VfioDeviceState.StopCopy) migration.Config.ReadShadow();
        if (threaded is null) session.SaveComplete(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    /// <summary>Sends numbered packets; the last one is the config record (QEMU: <c>vfio_multifd_save_complete_precopy_thread</c>).</summary>
    public void SaveLiveCompletePrecopyThread(IDeviceStateSink sink, CancellationToken cancel)
    {
        uint index = 0;
        migration.ThrowIfLost();
        threaded!.EnterStopCopy();
        while (true)
        {
            cancel.ThrowIfCancellationRequested();
            StateBuffer packet = StateBuffer.Rent(VfioStatePacket.HeaderBytes + VfioMigrationV2.MaxBufferBytes);
            int n = Read(threaded, packet);
            if (n == 0) break;
            VfioStatePacket.WriteHeader(packet.Span, index++, flags: 0);
            packet.Trim(VfioStatePacket.HeaderBytes + n);
            sink.Send(packet);
        }
        StateBuffer config = ConfigPacket();
        VfioStatePacket.WriteHeader(config.Span, index, VfioStatePacket.ConfigState);
        cancel.ThrowIfCancellationRequested();
        sink.Send(config);
    }

    public void SaveState(QemuFileWriter f)
    {
        if (threaded is not null) f.WriteUInt64(VfioStreamFlags.EndOfState);
        else WriteConfig(f);
    }

    public void SaveCleanup()
    {
        if (session.SaveCleanup() is { } failure) VfioMigrationLog.CleanupFailed(migration.Logger, migration.Id, failure.Message);
    }

    /// <summary>The CONFIG record (vfio-migration 3.4).</summary>
    private void WriteConfig(QemuFileWriter f)
    {
        f.WriteUInt64(VfioStreamFlags.DevConfigState);
        migration.Config.SaveConfig(f);
        f.WriteUInt64(VfioStreamFlags.EndOfState);
    }

    /// <returns>Bytes of device data behind the header; when 0, the packet has been disposed.</returns>
    private static int Read(IVfioThreadedSave session, StateBuffer packet)
    {
        int n = 0;
        try
        {
            n = session.ReadStopCopy(packet.Span[VfioStatePacket.HeaderBytes..]);
            return n;
        }
        finally
        {
            if (n == 0) packet.Dispose();
        }
    }

    private StateBuffer ConfigPacket()
    {
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(MaxConfigBytes);
        using (from)
        using (to)
        using (var f = new QemuFileWriter(from))
        {
            WriteConfig(f);
            f.Flush();
            StateBuffer packet = StateBuffer.Rent(VfioStatePacket.HeaderBytes + (int)f.Position);
            new QemuFileReader(to).Read(packet.Span[VfioStatePacket.HeaderBytes..]);
            return packet;
        }
    }
}
