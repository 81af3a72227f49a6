using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

public sealed partial class SampleDevice
{
    private const int MaxIncomingBytes = 1 << 20;

    private Save? _save;

    public ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to)
    {
        lock (_gate)
        {
            bool wasStopped = _isStopped;
            _isStopped = to is not (VfioDeviceState.Running or VfioDeviceState.PreCopy);
            if (_isStopped) _timer.Change(Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
            else if (wasStopped && _armedAt != 0) Arm(_armedAt);
        }
        return ValueTask.FromResult(Errno.None);
    }

    public ulong? EstimateStateBytes() => StateBytes;

    public IVfioUserSave OpenSave() => _save = new Save(this);

    public IVfioUserLoad OpenLoad() => new Load(this);

    private byte[] SaveState()
    {
        byte[] state = new byte[StateBytes];
        _memory.Slice(0, Bar1Bytes).CopyTo(state);
        lock (_gate) BinaryPrimitives.WriteInt64LittleEndian(state.AsSpan(Bar1Bytes), _armedAt);
        return state;
    }

    /// <summary>A save. A stopped device sends its whole state; a running one sends BAR1, once and after each change, which the load ignores.</summary>
    private sealed class Save(SampleDevice device) : IVfioUserSave
    {
        private bool _isChanged = true, _isStopped = device._host.State == VfioDeviceState.StopCopy;
        private byte[] _state = [];
        private int _at;

        public void MarkChanged() => _isChanged = true;

        public void StopCopy() => (_isStopped, _isChanged, _state, _at) = (true, true, [], 0);

        public int ReadState(Span<byte> destination, out Errno errno)
        {
            errno = Errno.None;
            if (_at == _state.Length && _isChanged) (_state, _at, _isChanged) = (_isStopped ? device.SaveState() : device.SaveState()[..Bar1Bytes], 0, false);
            int n = Math.Min(destination.Length, _state.Length - _at);
            _state.AsSpan(_at, n).CopyTo(destination);
            _at += n;
            return n;
        }

        public bool TryTake(int count, out ReadOnlyMemory<byte> bytes)
        {
            bytes = default;
            return false;
        }

        public void Dispose() => device._save = null;
    }

    /// <summary>A load. Only the end of the stream counts, because some clients also send what they read before the stop (vfio-user 8.2).</summary>
    private sealed class Load(SampleDevice device) : IVfioUserLoad
    {
        private readonly byte[] _last = new byte[StateBytes];
        private long _bytes;

        public Errno WriteState(ReadOnlySpan<byte> source)
        {
            if (_bytes + source.Length > MaxIncomingBytes) return Errno.EFBIG;
            _bytes += source.Length;
            ReadOnlySpan<byte> kept = source[Math.Max(0, source.Length - StateBytes)..];
            _last.AsSpan(kept.Length).CopyTo(_last);
            kept.CopyTo(_last.AsSpan(StateBytes - kept.Length));
            return Errno.None;
        }

        public ValueTask<Errno> Commit()
        {
            if (_bytes < StateBytes) return ValueTask.FromResult(Errno.EINVAL);
            _last.AsSpan(0, Bar1Bytes).CopyTo(device._memory.Slice(0, Bar1Bytes));
            lock (device._gate) device._armedAt = BinaryPrimitives.ReadInt64LittleEndian(_last.AsSpan(Bar1Bytes));
            return ValueTask.FromResult(Errno.None);
        }

        public void Dispose()
        {
        }
    }
}
