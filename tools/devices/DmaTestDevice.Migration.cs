using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tools.Devices;

public sealed partial class DmaTestDevice
{
    /// <summary>Sections of the stream. 1: registers, 2: config space, 3: interrupts, 4: BAR2, 5: internal state.</summary>
    private const uint RegistersSection = 1, ConfigSection = 2, IrqSection = 3, MemorySection = 4, BulkSection = 5, SectionCount = 5;
    private const int RegistersBytes = 64 + ScratchBytes + (Vectors * 16);
    private const ulong SmallBytes = 1 << 20, MaxPreviewBytes = 16 << 20;

    private bool _hasFailed, _hasFailedCommit;

    private ulong LimitBytes => _bulk.SizeBytes + SmallBytes;

    public async ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to)
    {
        if (_options.SlowMs > 0) await Task.Delay(_options.SlowMs);
        if (_options.Fail == to && !_hasFailed)
        {
            _hasFailed = true;
            return Errno.EIO;
        }
        lock (_gate)
        {
            // The device does no P2P, so a P2P state is the same as stopped.
            _isStopped = to is not (VfioDeviceState.Running or VfioDeviceState.PreCopy);
            if (!_isStopped) RestartPace();
            Monitor.PulseAll(_gate);
        }
        return Errno.None;
    }

    public ulong? EstimateStateBytes() => _bulk.SizeBytes + Bar2Bytes + RegistersBytes + VfioUserPciConfig.Length;

    public IVfioUserSave OpenSave()
    {
        var previews = new Previews(this);
        return new VfioUserStateWriter(TypeName, LimitBytes, _host.State == VfioDeviceState.StopCopy, Snapshot, previews.Next);
    }

    public IVfioUserLoad OpenLoad() => new VfioUserStateReader(TypeName, LimitBytes, new Incoming(this));

    private IEnumerable<VfioUserStateSection> Snapshot()
    {
        yield return VfioUserStateSection.Of(RegistersSection, SaveRegisters());
        yield return VfioUserStateSection.Of(ConfigSection, _config.SaveState());
        yield return VfioUserStateSection.Of(IrqSection, _host.Irqs.SaveState());
        yield return new VfioUserStateSection(MemorySection, Bar2Bytes, (offset, into) => _memory.Slice(offset, into.Length).CopyTo(into));
        yield return new VfioUserStateSection(BulkSection, _bulk.SizeBytes, _bulk.Read) { Memory = _bulk.Memory };
    }

    private byte[] SaveRegisters()
    {
        byte[] bytes = new byte[RegistersBytes];
        lock (_gate)
        {
            uint[] narrow = [_control, _status, _error, _block, _interruptEvery, _window];
            ulong[] wide = [_base, _length, _rate, _sequence, _interrupts];
            for (int i = 0; i < narrow.Length; i++) BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(4 * i), narrow[i]);
            for (int i = 0; i < wide.Length; i++) BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(24 + (8 * i)), wide[i]);
            _scratch.CopyTo(bytes, 64);
            _msixTable.CopyTo(bytes, 64 + ScratchBytes);
        }
        return bytes;
    }

    private bool LoadRegisters(ReadOnlySpan<byte> bytes)
    {
        Span<uint> narrow = stackalloc uint[6];
        for (int i = 0; i < narrow.Length; i++) narrow[i] = BinaryPrimitives.ReadUInt32LittleEndian(bytes[(4 * i)..]);
        if (narrow[3] is 0 or > 65536 || narrow[3] % 8 != 0 || (narrow[0] & ~ControlRun) != 0) return false;
        (_control, _status, _error, _block, _interruptEvery) = (narrow[0], narrow[1], narrow[2], narrow[3], narrow[4]);
        _window = narrow[5] & (Bar0Bytes - 4);
        _base = BinaryPrimitives.ReadUInt64LittleEndian(bytes[24..]);
        _length = BinaryPrimitives.ReadUInt64LittleEndian(bytes[32..]);
        _rate = BinaryPrimitives.ReadUInt64LittleEndian(bytes[40..]);
        _sequence = BinaryPrimitives.ReadUInt64LittleEndian(bytes[48..]);
        _interrupts = BinaryPrimitives.ReadUInt64LittleEndian(bytes[56..]);
        bytes.Slice(64, ScratchBytes).CopyTo(_scratch);
        bytes.Slice(64 + ScratchBytes, _msixTable.Length).CopyTo(_msixTable);
        return true;
    }

    /// <summary>The sections of a running device: a part of the internal state once, then the registers whenever the engine has written blocks.</summary>
    private sealed class Previews(DmaTestDevice device)
    {
        private readonly ulong _bulkBytes = Math.Min(device._bulk.SizeBytes, MaxPreviewBytes);
        private ulong _bulkAt, _sequence = ulong.MaxValue;

        internal VfioUserStateSection? Next(int room)
        {
            if (_bulkAt < _bulkBytes)
            {
                ulong at = _bulkAt, n = Math.Min((ulong)room, _bulkBytes - at);
                _bulkAt += n;
                return new VfioUserStateSection(BulkSection, n, (offset, into) => device._bulk.Read(at + offset, into));
            }
            ulong sequence;
            lock (device._gate) sequence = device._sequence;
            if (room < RegistersBytes || sequence == _sequence) return null;
            _sequence = sequence;
            return VfioUserStateSection.Of(RegistersSection, device.SaveRegisters());
        }
    }

    /// <summary>A load. Keeps small sections until all have arrived; writes the internal state in place, because the old one is not needed.</summary>
    private sealed class Incoming(DmaTestDevice device) : IVfioUserStateSink
    {
        private readonly Dictionary<uint, byte[]> _small = [];
        private bool _hasBulk;

        public void BeginSnapshot()
        {
            _small.Clear();
            _hasBulk = false;
        }

        public Errno BeginSection(uint id, ulong lengthBytes)
        {
            ulong expected = id switch
            {
                RegistersSection => RegistersBytes,
                ConfigSection => VfioUserPciConfig.Length,
                IrqSection => (ulong)device._host.Irqs.SaveState().Length,
                MemorySection => Bar2Bytes,
                BulkSection => device._bulk.SizeBytes,
                _ => ulong.MaxValue,
            };
            if (lengthBytes != expected || _small.ContainsKey(id) || (id == BulkSection && _hasBulk)) return Errno.EINVAL;
            if (id == BulkSection) _hasBulk = true;
            else _small[id] = new byte[lengthBytes];
            return Errno.None;
        }

        public Errno SectionData(uint id, ulong offset, ReadOnlySpan<byte> data)
        {
            if (id == BulkSection) device._bulk.Write(offset, data);
            else data.CopyTo(_small[id].AsSpan((int)offset));
            return Errno.None;
        }

        public ValueTask<Errno> Commit() => ValueTask.FromResult(Apply());

        private Errno Apply()
        {
            if (_small.Count + (_hasBulk ? 1 : 0) != SectionCount) return Errno.EINVAL;
            if (device._options.FailCommit && !device._hasFailedCommit)
            {
                device._hasFailedCommit = true;
                return Errno.EIO;
            }
            lock (device._gate)
            {
                if (!device.LoadRegisters(_small[RegistersSection]) || !device._config.LoadState(_small[ConfigSection]) || !device._host.Irqs.LoadState(_small[IrqSection]))
                    return Errno.EINVAL;
                _small[MemorySection].CopyTo(device._memory.Slice(0, Bar2Bytes));
                device._loads++;
            }
            return Errno.None;
        }
    }
}
