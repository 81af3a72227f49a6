using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>One attempt to save a v1 device (vfio-migration 5.3).</summary>
internal sealed class VfioSaveV1(VfioMigrationV1 protocol, VfioMigrationRegion region, DeviceTransferCounter transfer) : IVfioSaveSession, IDisposable
{
    private readonly VfioMigrationRegionData _data = region.OpenData();
    private readonly byte[] _buffer = GC.AllocateUninitializedArray<byte>(VfioMigrationV1.BufferBytes, pinned: true);
    private ulong _pendingBytes;

    public bool IsActiveIterate => VfioStateArcs.IsSaving(protocol.State);

    public void SaveSetup()
    {
        _data.Map();
        VfioDeviceState state = protocol.State;
        protocol.SetState(state == VfioDeviceState.Running ? VfioDeviceState.PreCopy : VfioDeviceState.StopCopy, state);
    }

    /// <summary>None: v1 has no first data.</summary>
    public int TakeSwitchoverAckRequests() => 0;

    public PendingBytes EstimatePending() => new((long)Math.Min(_pendingBytes, long.MaxValue / 4));

    public PendingBytes ExactPending()
    {
        lock (protocol.Gate)
        {
            if (!IsActiveIterate || region.ReadPendingBytes(out ulong pending) != Errno.None) pending = 0;
            _pendingBytes = pending;
        }
        return EstimatePending();
    }

    public (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f)
    {
        lock (protocol.Gate)
        {
            if (_pendingBytes == 0) ReadPending();
            if (_pendingBytes == 0)
            {
                f.WriteUInt64(VfioStreamFlags.DevDataState);
                f.WriteUInt64(0);
                return (SaveProgress.Done, VfioStreamFlags.EndOfState);
            }
            SaveBuffer(f);
            // A snapshot never asks for the pending bytes; without this it would go by an old figure.
            _pendingBytes = 0;
            return (SaveProgress.More, VfioStreamFlags.EndOfState);
        }
    }

    public void SaveComplete(QemuFileWriter f)
    {
        protocol.SetState(VfioDeviceState.StopCopy, VfioDeviceState.Error);
        lock (protocol.Gate)
        {
            ReadPending();
            while (_pendingBytes > 0 && SaveBuffer(f) > 0) ReadPending();
        }
        protocol.SetState(VfioDeviceState.Stop, VfioDeviceState.Error);
    }

    public bool IsSizeUnknown => false;

    public VfioException? SaveCleanup()
    {
        Dispose();
        protocol.Close(this);
        return VfioMigration.LeaveSaving(protocol);
    }

    /// <summary>Gives back the mappings.</summary>
    public void Dispose()
    {
        lock (protocol.Gate) _data.Dispose();
    }

    private void ReadPending()
    {
        Errno errno = region.ReadPendingBytes(out _pendingBytes);
        if (errno != Errno.None) throw region.Failed("read pending_bytes", errno);
    }

    /// <summary>Writes one chunk as a data record.</summary>
    /// <returns>Its size in bytes.</returns>
    private ulong SaveBuffer(QemuFileWriter f)
    {
        ulong offset = region.ReadDataOffset();
        ulong size = region.ReadDataSize(offset);
        f.WriteUInt64(VfioStreamFlags.DevDataState);
        f.WriteUInt64(size);
        for (ulong done = 0; done < size;)
        {
            Span<byte> part = _buffer.AsSpan(0, (int)Math.Min(size - done, (ulong)_buffer.Length));
            _data.Read(offset + done, part);
            f.Write(part);
            done += (ulong)part.Length;
        }
        transfer.Add((long)size);
        return size;
    }
}
