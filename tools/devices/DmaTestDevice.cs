using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tools.Devices;

/// <summary>
/// A PCI function for tests of migration: BAR0 registers (<see cref="DmaTestRegisters"/>), BAR1 the MSI-X table and pending bits, BAR2 16 KiB of
/// memory that a client may map, BAR3 two I/O ports that give access to the registers too. Its engine writes numbered blocks into guest memory. If every
/// slot holds the last block that went to it after a migration, nothing was lost.
/// </summary>
public sealed partial class DmaTestDevice : IVfioUserBackend
{
    private const uint Bar0 = 0, Bar1 = 1, Bar2 = 2, Bar3 = 3;
    private const int Bar0Bytes = 0x1000, Bar1Bytes = 0x1000, Bar2Bytes = 0x4000, Bar3Bytes = 8, PendingOffset = 0x800, Vectors = 4;

    private readonly DmaTestOptions _options;
    private readonly VfioUserMemory _memory = new("dma-test", Bar2Bytes);
    private readonly BulkState _bulk;
    private readonly byte[] _msixTable = new byte[Vectors * 16], _scratch = new byte[ScratchBytes];
    private VfioUserHost _host = null!;
    private VfioUserPciConfig _config = null!;

    // Guest-visible state, guarded by _gate.
    private readonly object _gate = new();
    private uint _control, _status, _error, _block, _interruptEvery, _loads, _window;
    private ulong _base, _length, _rate, _sequence, _interrupts;

    public DmaTestDevice(DmaTestOptions options)
    {
        _options = options;
        _bulk = new BulkState(options.StateBytes, options.Seed);
        MigrationFlags = VfioMigrationFlags.StopCopy | (options.Precopy ? VfioMigrationFlags.PreCopy : 0) | (options.P2P ? VfioMigrationFlags.P2P : 0);
        Regions =
        [
            new VfioUserRegion { Index = Bar0, SizeBytes = Bar0Bytes },
            new VfioUserRegion { Index = Bar1, SizeBytes = Bar1Bytes },
            new VfioUserRegion { Index = Bar2, SizeBytes = Bar2Bytes, Memory = _memory },
            new VfioUserRegion { Index = Bar3, SizeBytes = Bar3Bytes },
            new VfioUserRegion { Index = VfioPciRegion.Config, SizeBytes = VfioUserPciConfig.Length },
        ];
        PowerOn();
    }

    public string TypeName => "dma-test";

    public IReadOnlyList<VfioUserRegion> Regions { get; }

    public VfioMigrationFlags MigrationFlags { get; }

    public uint GetIrqCount(uint index) => index switch { VfioPciIrq.Intx => 1, VfioPciIrq.Msix => Vectors, _ => 0 };

    public void Realize(VfioUserHost host)
    {
        ArgumentNullException.ThrowIfNull(host);
        _host = host;
        _config = new VfioUserPciConfig(host.Dma, VendorId, DeviceId, 0xff0000, hasIntx: true) { IntxLevel = () => host.Irqs.IsIntxAsserted };
        _config.AddBar(0, Bar0Bytes);
        _config.AddBar(1, Bar1Bytes);
        _config.AddBar(2, Bar2Bytes);
        _config.AddIoBar(3, Bar3Bytes);
        _config.AddMsix(PciRegisters.HeaderBytes, new MsixLayout(Vectors, (int)Bar1, 0, (int)Bar1, PendingOffset));
        StartEngine();
    }

    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        switch (index)
        {
            case Bar0:
                lock (_gate) ReadRegisters(offset, destination);
                break;
            case Bar1:
                ReadMsix((int)offset, destination);
                break;
            case Bar2:
                _memory.Slice(offset, destination.Length).CopyTo(destination);
                break;
            case Bar3:
                lock (_gate) ReadWindow(offset, destination);
                break;
            default:
                _config.Read(offset, destination);
                break;
        }
    }

    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        switch (index)
        {
            case Bar0:
                lock (_gate)
                {
                    WriteRegisters(offset, source);
                    Monitor.PulseAll(_gate);
                }
                break;
            case Bar1:
                if (offset < (ulong)_msixTable.Length) source[..Math.Min(source.Length, _msixTable.Length - (int)offset)].CopyTo(_msixTable.AsSpan((int)offset));
                break;
            case Bar2:
                source.CopyTo(_memory.Slice(offset, source.Length));
                break;
            case Bar3:
                lock (_gate)
                {
                    WriteWindow(offset, source);
                    Monitor.PulseAll(_gate);
                }
                break;
            default:
                // The lock is needed because the engine reads bus mastering and the kind of interrupt.
                lock (_gate)
                {
                    _config.Write(offset, source);
                    Monitor.PulseAll(_gate);
                }
                break;
        }
    }

    public ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        lock (_gate)
        {
            PowerOn();
            _config.Reset();
            _memory.Slice(0, Bar2Bytes).Clear();
            _bulk.Reset();
            _host.Irqs.ClearPending();
            _isStopped = false;
            Monitor.PulseAll(_gate);
        }
        return ValueTask.FromResult(Errno.None);
    }

    public void ClientLost()
    {
        // Nothing to do: the engine finds no memory and waits for a client.
    }

    public void Dispose()
    {
        StopEngine();
        _memory.Dispose();
    }

    private void PowerOn()
    {
        (_control, _status, _error, _block, _interruptEvery, _window) = (0, 0, 0, 4096, 0, 0);
        (_base, _length, _rate, _sequence, _interrupts) = (0, 0, 0, 0, 0);
        _scratch.AsSpan().Clear();
        _msixTable.AsSpan().Clear();
    }

    /// <summary>Reads BAR3, for guests that use only I/O ports: at 0 the u32 offset of a register of BAR0, at 4 its 4 bytes.</summary>
    private void ReadWindow(ulong offset, Span<byte> into)
    {
        if (into.Length != 4) return;
        if (offset == 0) BinaryPrimitives.WriteUInt32LittleEndian(into, _window);
        else if (offset == 4) ReadRegisters(_window, into);
    }

    private void WriteWindow(ulong offset, ReadOnlySpan<byte> from)
    {
        if (from.Length != 4) return;
        if (offset == 0) _window = BinaryPrimitives.ReadUInt32LittleEndian(from) & (Bar0Bytes - 4);
        else if (offset == 4) WriteRegisters(_window, from);
    }

    private void ReadRegisters(ulong offset, Span<byte> into)
    {
        if (offset >= Scratch && offset + (ulong)into.Length <= Scratch + ScratchBytes)
        {
            _scratch.AsSpan((int)(offset - Scratch), into.Length).CopyTo(into);
            return;
        }
        if (into.Length == 4 && Get32(offset) is { } value) BinaryPrimitives.WriteUInt32LittleEndian(into, value);
        else if (into.Length is 4 or 8 && Get64(offset & ~4UL) is { } wide)
        {
            if (into.Length == 8) BinaryPrimitives.WriteUInt64LittleEndian(into, wide);
            else BinaryPrimitives.WriteUInt32LittleEndian(into, (uint)(wide >> ((int)(offset & 4) * 8)));
        }
    }

    private uint? Get32(ulong offset) => offset switch
    {
        Id => IdValue,
        Control => _control,
        Status => _status,
        ErrorNumber => _error,
        Block => _block,
        InterruptEvery => _interruptEvery,
        Loads => _loads,
        Acknowledge => 0,
        _ => null,
    };

    private ulong? Get64(ulong offset) => offset switch
    {
        Base => _base,
        Length => _length,
        Rate => _rate,
        Sequence => _sequence,
        Interrupts => _interrupts,
        StateSize => _bulk.SizeBytes,
        StateChecksum => _bulk.Checksum,
        _ => null,
    };

    private void WriteRegisters(ulong offset, ReadOnlySpan<byte> from)
    {
        if (offset >= Scratch && offset + (ulong)from.Length <= Scratch + ScratchBytes)
        {
            from.CopyTo(_scratch.AsSpan((int)(offset - Scratch)));
        }
        else if (from.Length == 4)
        {
            uint value = BinaryPrimitives.ReadUInt32LittleEndian(from);
            if (!Set32(offset, value) && Get64(offset & ~4UL) is { } old)
            {
                int shift = (int)(offset & 4) * 8;
                Set64(offset & ~4UL, (old & ~(0xffffffffUL << shift)) | ((ulong)value << shift));
            }
        }
        else if (from.Length == 8)
        {
            Set64(offset, BinaryPrimitives.ReadUInt64LittleEndian(from));
        }
    }

    private bool Set32(ulong offset, uint value)
    {
        switch (offset)
        {
            case Control:
                _control = value & ControlRun;
                (_status, _error) = (_status & StatusInterrupt, 0);
                RestartPace();
                return true;
            case Block:
                if (value is > 0 and <= 65536 && value % 8 == 0) _block = value;
                return true;
            case InterruptEvery:
                _interruptEvery = value;
                return true;
            case Acknowledge:
                _status &= ~StatusInterrupt;
                _host.Irqs.SetIntx(false);
                return true;
            default:
                return Get32(offset) is not null;
        }
    }

    private void Set64(ulong offset, ulong value)
    {
        switch (offset)
        {
            case Base: _base = value; break;
            case Length: _length = value; break;
            case Rate: _rate = value; RestartPace(); break;
            case Sequence: _sequence = value; break;
        }
    }

    private void ReadMsix(int offset, Span<byte> into)
    {
        if (offset < _msixTable.Length)
        {
            int n = Math.Min(into.Length, _msixTable.Length - offset);
            _msixTable.AsSpan(offset, n).CopyTo(into);
        }
        if (offset >= PendingOffset + 8 || offset + into.Length <= PendingOffset) return;
        byte pending = 0;
        for (uint v = 0; v < Vectors; v++)
            if (_host.Irqs.IsPending(VfioPciIrq.Msix, v)) pending |= (byte)(1 << (int)v);
        if (offset <= PendingOffset) into[PendingOffset - offset] = pending;
    }
}
