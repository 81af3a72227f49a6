using Vmm.Core.Errors;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>One attempt to load a v1 device (vfio-migration 5.4).</summary>
internal sealed class VfioLoadV1 : IVfioLoadSession, IDisposable
{
    private readonly VfioMigrationV1 _protocol;
    private readonly VfioMigrationRegion _region;
    private readonly VfioMigrationRegionData _data;
    private readonly byte[] _buffer = GC.AllocateUninitializedArray<byte>(VfioMigrationV1.BufferBytes, pinned: true);

    /// <summary>Maps the data section and moves the device to RESUMING. BQL: held.</summary>
    internal VfioLoadV1(VfioMigrationV1 protocol, VfioMigrationRegion region)
    {
        (_protocol, _region, _data) = (protocol, region, region.OpenData());
        _data.Map();
        try
        {
            protocol.SetState(VfioDeviceState.Resuming, protocol.State);
        }
        catch
        {
            _data.Dispose();
            throw;
        }
    }

    public void LoadData(QemuFileReader f, ulong lengthBytes)
    {
        while (lengthBytes > 0)
        {
            // A chunk that is longer than the data section here goes in parts, each committed; shorter ones are not joined (vfio-migration 5.4).
            ulong offset = _region.ReadDataOffset();
            ulong room = Math.Min(lengthBytes, _region.SizeBytes - offset);
            if (room == 0) throw _region.NoRoom(offset);
            for (ulong done = 0; done < room;)
            {
                Span<byte> part = _buffer.AsSpan(0, (int)Math.Min(room - done, (ulong)_buffer.Length));
                f.Read(part);
                _data.Write(offset + done, part);
                done += (ulong)part.Length;
            }
            _region.CommitDataSize(room);
            lengthBytes -= room;
        }
    }

    /// <summary>Nothing: v1 leaves RESUMING only for RUNNING, so the device judges its data when the VM starts.</summary>
    public void LoadDone()
    {
    }

    public void LoadCleanup()
    {
        Dispose();
        _protocol.Close(this);
    }

    /// <summary>Gives back the mappings.</summary>
    public void Dispose() => _data.Dispose();
}
