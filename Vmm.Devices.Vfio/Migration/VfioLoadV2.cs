using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>One attempt to load a v2 device (vfio-migration 3.5).</summary>
internal sealed class VfioLoadV2 : IVfioThreadedLoad
{
    private const int DirectReadAheadBytes = 4096;

    private readonly VfioMigrationV2 _protocol;
    private readonly byte[] _buffer;

    /// <summary>Moves the device to RESUMING, back to where it was when that fails. BQL: held.</summary>
    internal VfioLoadV2(VfioMigrationV2 protocol)
    {
        _protocol = protocol;
        protocol.SetState(VfioDeviceState.Resuming, protocol.State);
        _buffer = GC.AllocateUninitializedArray<byte>(VfioMigrationV2.MaxBufferBytes, pinned: true);
    }

    public void LoadData(QemuFileReader f, ulong lengthBytes)
    {
        if (_protocol.Direct is { CanMove: true } direct && f.Channel.Descriptor is { } socket)
        {
            LoadDirect(f, lengthBytes, direct, socket);
            return;
        }
        while (lengthBytes > 0)
        {
            Span<byte> part = _buffer.AsSpan(0, (int)Math.Min(lengthBytes, (ulong)_buffer.Length));
            f.Read(part);
            LoadBytes(part);
            lengthBytes -= (ulong)part.Length;
        }
    }

    public void LoadBytes(ReadOnlySpan<byte> bytes) => _protocol.Write(bytes);

    public void LoadDone()
    {
        if (_protocol.Direct is { } direct && direct.FinishMoves() is var errno and not Errno.None) throw _protocol.WriteFailed(errno);
        // Not left to the start of the VM: a device that rejects its data fails the load while the source can still go on.
        if (_protocol.State == VfioDeviceState.Resuming) _protocol.SetState(VfioDeviceState.Stop, VfioDeviceState.Error);
    }

    public void LoadCleanup() => _protocol.Close(this);

    private void LoadDirect(QemuFileReader f, ulong lengthBytes, IVfioDirectData direct, OwnedFd socket)
    {
        // The reader copies what it reads ahead, so it may read ahead only as far as the head of the next record.
        f.ReadAheadBytes = DirectReadAheadBytes;
        while (lengthBytes > 0)
        {
            int n = (int)Math.Min(lengthBytes, (ulong)direct.PieceBytes);
            ReadOnlySpan<byte> buffered = f.TakeBuffered(n);
            Errno errno = direct.MoveIn(buffered, socket, f.Channel.Name, n);
            f.NoteMoved(n - buffered.Length);
            if (errno != Errno.None) throw _protocol.WriteFailed(errno);
            lengthBytes -= (ulong)n;
        }
    }
}
