using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// Region 9: the migration protocol from before September 2023, as an adapter over the sessions of v2 (vfio-user 9, S-42 to S-48).
/// <code>
/// 0  u32 device_state   rw   1 running, 2 saving, 4 resuming; 6 error
/// 8  u64 pending_bytes  ro   reading it ends an iteration and starts the next
/// 16 u64 data_offset    ro   constant; reading it makes the chunk available
/// 24 u64 data_size      ro while saving; written while resuming to commit what was written to the data area
/// 0x1000                     data area, 64 KiB
/// </code>
/// </summary>
/// <param name="fsm">The session.</param>
/// <param name="hasPrecopy">The device has PRE_COPY; without it the device runs on in state 3 and gives no data.</param>
/// <param name="setState">Moves the device to a v2 state.</param>
internal sealed class VfioUserLegacyMigration(VfioUserFsm fsm, bool hasPrecopy, Func<VfioDeviceState, Errno> setState)
{
    internal const ulong DataOffset = 0x1000;
    internal const int DataBytes = 64 << 10;
    internal const ulong SizeBytes = DataOffset + DataBytes;

    private const ulong StateRegister = 0, PendingRegister = 8, OffsetRegister = 16, SizeRegister = 24;
    private const uint Stopped = 0, Running = 1, StopCopy = 2, PreCopy = 3, Resuming = 4, Error = 6;

    private readonly byte[] _data = new byte[DataBytes];
    private Phase _phase;
    /// <summary>While saving: length of the chunk in bytes. While resuming: end of what was written to the data area.</summary>
    private int _bytes;
    private bool _isEmptyPrecopy;

    private enum Phase
    {
        /// <summary>No iteration.</summary>
        Initial,
        /// <summary>A read of pending_bytes has announced a chunk; the client has not fetched it yet.</summary>
        Started,
        /// <summary>The client can read the chunk, repeatedly and in any parts (vfio-user S-46).</summary>
        Prepared,
        /// <summary>The last read of pending_bytes found no data.</summary>
        Finished,
    }

    private uint State => fsm.State switch
    {
        VfioDeviceState.Stop => Stopped,
        VfioDeviceState.Running or VfioDeviceState.RunningP2P => _isEmptyPrecopy ? PreCopy : Running,
        VfioDeviceState.StopCopy => StopCopy,
        VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P => PreCopy,
        VfioDeviceState.Resuming => Resuming,
        _ => Error,
    };

    private bool IsSaving => State is StopCopy or PreCopy;

    /// <summary>Called after a reset: no iteration, no data.</summary>
    internal void Restart() => (_phase, _bytes, _isEmptyPrecopy) = (Phase.Initial, 0, false);

    /// <summary>A read inside the region. Registers have one width.</summary>
    internal Errno Read(ulong offset, Span<byte> into)
    {
        if (offset >= DataOffset) return ReadData((int)(offset - DataOffset), into);
        ulong value;
        Errno errno;
        switch (offset, into.Length)
        {
            case (StateRegister, 4):
                BinaryPrimitives.WriteUInt32LittleEndian(into, State);
                return Errno.None;
            case (PendingRegister, 8):
                errno = ReadPending(out value);
                break;
            case (OffsetRegister, 8):
                (errno, value) = (ReadOffset(), DataOffset);
                break;
            case (SizeRegister, 8):
                (errno, value) = (IsSaving && _phase == Phase.Prepared ? Errno.None : Errno.EINVAL, (ulong)_bytes);
                break;
            default:
                return Errno.EINVAL;
        }
        if (errno == Errno.None) BinaryPrimitives.WriteUInt64LittleEndian(into, value);
        return errno;
    }

    /// <summary>A write inside the region.</summary>
    internal Errno Write(ulong offset, ReadOnlySpan<byte> from)
    {
        if (offset >= DataOffset)
        {
            if (State != Resuming) return Errno.EINVAL;
            int at = (int)(offset - DataOffset);
            from.CopyTo(_data.AsSpan(at));
            _bytes = Math.Max(_bytes, at + from.Length);
            return Errno.None;
        }
        return (offset, from.Length) switch
        {
            (StateRegister, 4) => WriteState(BinaryPrimitives.ReadUInt32LittleEndian(from)),
            (SizeRegister, 8) when State == Resuming => Commit(BinaryPrimitives.ReadUInt64LittleEndian(from)),
            _ => Errno.EINVAL,
        };
    }

    /// <summary>Whether a change of state is allowed (vfio-user 9). QEMU's driver of that time saves a paused machine by going from 0 to 2.</summary>
    private static bool IsAllowed(uint from, uint to) => from == to || (from, to) switch
    {
        (Stopped, Running or StopCopy) => true,
        (Running, Stopped or StopCopy or PreCopy or Resuming) => true,
        (StopCopy, Stopped or Running) => true,
        (PreCopy, Stopped or Running or StopCopy) => true,
        (Resuming, Running) => true,
        _ => false,
    };

    private Errno WriteState(uint target)
    {
        uint from = State;
        if (target > Resuming || from == Error || !IsAllowed(from, target)) return Errno.EINVAL;
        bool staysRunning = target == PreCopy && !hasPrecopy;
        Errno errno = from == target ? Errno.None : setState(target switch
        {
            Stopped => VfioDeviceState.Stop,
            StopCopy => VfioDeviceState.StopCopy,
            PreCopy => hasPrecopy ? VfioDeviceState.PreCopy : VfioDeviceState.Running,
            Resuming => VfioDeviceState.Resuming,
            _ => VfioDeviceState.Running,
        });
        if (errno != Errno.None) return errno;
        _isEmptyPrecopy = staysRunning;
        // A chunk that was announced but not fetched stays the next one, because the session would not give it twice.
        bool keeps = _phase == Phase.Started && from is PreCopy or StopCopy && target is PreCopy or StopCopy;
        if (keeps) return Errno.None;
        (_phase, _bytes) = (Phase.Initial, 0);
        return Errno.None;
    }

    /// <summary>
    /// Consumes the previous chunk and announces the next one, and no more than that (vfio-user S-48); repeated reads have no effect (vfio-user
    /// S-47).
    /// </summary>
    private Errno ReadPending(out ulong value)
    {
        value = 0;
        if (!IsSaving) return Errno.None;
        bool isAtEnd = _phase == Phase.Finished && State == StopCopy;
        if (_phase != Phase.Started && !isAtEnd)
        {
            int n = 0;
            if (!_isEmptyPrecopy)
            {
                n = fsm.Read(_data, out Errno errno);
                if (n < 0) return errno;
            }
            (_bytes, _phase) = (n, n > 0 ? Phase.Started : Phase.Finished);
        }
        value = _phase == Phase.Started ? (ulong)_bytes : 0;
        return Errno.None;
    }

    private Errno ReadOffset()
    {
        if (State == Resuming) return Errno.None;
        if (!IsSaving || _phase is not (Phase.Started or Phase.Prepared)) return Errno.EINVAL;
        _phase = Phase.Prepared;
        return Errno.None;
    }

    private Errno ReadData(int at, Span<byte> into)
    {
        if (!IsSaving || _phase != Phase.Prepared || at + into.Length > _bytes) return Errno.EINVAL;
        _data.AsSpan(at, into.Length).CopyTo(into);
        return Errno.None;
    }

    private Errno Commit(ulong bytes)
    {
        if (bytes > (ulong)_bytes) return Errno.EINVAL;
        _bytes = 0;
        return fsm.Write(_data.AsSpan(0, (int)bytes));
    }
}
