using System.Diagnostics.CodeAnalysis;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;
using Vmm.Core.VmStates;

namespace Vmm.Tools.Devices;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// QEMU's teaching device (QEMU: <c>edu</c>, docs/specs/edu): an inverting register, a factorial, interrupts on request, and a DMA engine
/// with a buffer of 4 KiB. An ordinary PCI function, which works the same in a VM of this process and, served, in another VMM.
/// <code>
/// 0x00 u32 ro identification            0x60 u32 wo raise interrupts
/// 0x04 u32 rw reads back inverted       0x64 u32 wo acknowledge interrupts
/// 0x08 u32 rw factorial of what is written
/// 0x20 u32 rw status: bit 0 ro computing, bit 7 interrupt when done
/// 0x24 u32 ro pending interrupts: 1 factorial, 0x100 DMA, others as raised
/// 0x80 u64 rw DMA source   0x88 u64 rw DMA destination   0x90 u64 rw DMA bytes
/// 0x98 u64 rw DMA command: bit 0 starts, and is set while it runs; bit 1 to memory; bit 2 interrupt when done
/// </code>
/// </summary>
public sealed class EduDevice : PciDevice, IVmDevice, IVmStateHandler
{
    public const int Bar0Bytes = 1 << 20, BufferBytes = 4096;
    public const ulong BufferAt = 0x40000;
    public const uint Identification = 0x010000ed, FactorialInterrupt = 1, DmaInterrupt = 0x100;

    private const uint StatusComputing = 1, StatusInterrupt = 0x80;
    private const ulong DmaRun = 1, DmaToMemory = 2, DmaWantsInterrupt = 4;

    public static VmStateDescription<EduDevice> Description { get; } = new()
    {
        Name = "edu",
        Fields =
        [
            VmState.Struct<EduDevice, PciDevice>("parent_obj", PciState, static d => d),
            VmState.UInt32<EduDevice>("addr4", static d => ref d._inverted),
            VmState.UInt32<EduDevice>("fact", static d => ref d._factorial),
            VmState.UInt32<EduDevice>("status", static d => ref d._status),
            VmState.UInt32<EduDevice>("irq_status", static d => ref d._irqStatus),
            VmState.UInt64<EduDevice>("dma.src", static d => ref d._dmaSource),
            VmState.UInt64<EduDevice>("dma.dst", static d => ref d._dmaDestination),
            VmState.UInt64<EduDevice>("dma.cnt", static d => ref d._dmaCount),
            VmState.UInt64<EduDevice>("dma.cmd", static d => ref d._dmaCommand),
            VmState.Buffer<EduDevice>("dma_buf", BufferBytes, static d => d._buffer),
        ],
    };

    // No part of the guest-visible state.
    private readonly Bql _bql;
    private readonly IDisposable _section, _handler;
    private readonly object _gate = new();
    private readonly ulong _dmaMask;
    private readonly Task _worker;
    private bool _ends, _runs, _hasWork, _isTransferring;

    // Guest-visible state; BQL.
    private readonly byte[] _buffer = new byte[BufferBytes];
    private uint _inverted, _factorial, _status, _irqStatus;
    private ulong _dmaSource, _dmaDestination, _dmaCount, _dmaCommand;

    public EduDevice(DeviceOptions options, IDeviceServices services)
        : base((services ?? throw new ArgumentNullException(nameof(services))).Pci,
            new PciDeviceOptions { Id = (options ?? throw new ArgumentNullException(nameof(options))).Id, Address = options.GetString("addr", "") is { Length: > 0 } at ? at : null })
    {
        _bql = services.Bql;
        _dmaMask = options.GetUInt64("dma_mask", (1UL << 28) - 1);
        Config.SetUInt16(PciRegisters.VendorId, 0x1234);
        Config.SetUInt16(PciRegisters.DeviceId, 0x11e8);
        Config.SetUInt16(PciRegisters.SubsystemVendorId, 0x1af4);
        Config.SetUInt16(PciRegisters.SubsystemId, 0x1100);
        Config.Bytes[PciRegisters.RevisionId] = 0x10;
        Config.SetUInt16(PciRegisters.ClassDevice, 0x00ff);
        Config.Bytes[PciRegisters.InterruptPin] = 1;
        AddMsi(0x40, 1, is64Bit: true, isMaskable: false);
        RegisterBar(0, PciBarType.Memory32, Bar0Bytes);
        _section = services.RegisterVmState(Description, this, path: Path);
        _handler = services.RunState.Register(this);
        _worker = WorkerThread.Run("edu", Work);
    }

    public void OnVmStateChange(bool running, RunState state)
    {
        lock (_gate)
        {
            _runs = running;
            _hasWork |= running;
            Monitor.PulseAll(_gate);
            // Memory must not change after this returns. An unfinished transfer starts again when the VM runs, here or on the destination.
            while (!running && _isTransferring) Monitor.Wait(_gate);
        }
    }

    public override void Reset()
    {
        base.Reset();
        (_inverted, _factorial, _status, _irqStatus) = (0, 0, 0, 0);
        (_dmaSource, _dmaDestination, _dmaCount, _dmaCommand) = (0, 0, 0, 0);
        _buffer.AsSpan().Clear();
    }

    protected override ulong BarRead(int bar, ulong offset, int size) => offset switch
    {
        _ when size != 4 && !(size == 8 && offset >= 0x80) => PciHost.AllOnes(size),
        0x00 => Identification,
        0x04 => _inverted,
        0x08 => _factorial,
        0x20 => _status,
        0x24 => _irqStatus,
        0x80 => _dmaSource,
        0x88 => _dmaDestination,
        0x90 => _dmaCount,
        0x98 => _dmaCommand,
        _ => PciHost.AllOnes(size),
    };

    protected override void BarWrite(int bar, ulong offset, int size, ulong value)
    {
        if (size != 4 && !(size == 8 && offset >= 0x80)) return;
        switch (offset)
        {
            case 0x04: _inverted = ~(uint)value; break;
            case 0x08 when (_status & StatusComputing) == 0: (_factorial, _status) = ((uint)value, _status | StatusComputing); WakeUp(); break;
            case 0x20: _status = (_status & ~StatusInterrupt) | ((uint)value & StatusInterrupt); break;
            case 0x60: Raise((uint)value); break;
            case 0x64: Acknowledge((uint)value); break;
            case 0x80 when !IsDmaRunning: _dmaSource = value; break;
            case 0x88 when !IsDmaRunning: _dmaDestination = value; break;
            case 0x90 when !IsDmaRunning: _dmaCount = value; break;
            case 0x98 when !IsDmaRunning && (value & DmaRun) != 0: _dmaCommand = value & (DmaRun | DmaToMemory | DmaWantsInterrupt); WakeUp(); break;
        }
    }

    protected override void Dispose(bool disposing)
    {
        lock (_gate)
        {
            _ends = true;
            Monitor.PulseAll(_gate);
        }
        _handler.Dispose();
        _section.Dispose();
        base.Dispose(disposing);
        // With the BQL held, waiting would deadlock, because the worker may need the BQL. It checks _ends before it touches anything.
        if (!_bql.IsHeld) _worker.WaitAndUnwrapException();
    }

    private bool IsDmaRunning => (_dmaCommand & DmaRun) != 0;

    private void WakeUp()
    {
        lock (_gate)
        {
            _hasWork = true;
            Monitor.PulseAll(_gate);
        }
    }

    private void Work()
    {
        byte[] bytes = new byte[BufferBytes];
        while (true)
        {
            lock (_gate)
            {
                while (!_ends && !(_runs && _hasWork)) Monitor.Wait(_gate);
                if (_ends) return;
                _hasWork = false;
            }
            Compute();
            Transfer(bytes);
        }
    }

    private void Compute()
    {
        uint n;
        using (_bql.Acquire())
        {
            if (!MayFinish || (_status & StatusComputing) == 0) return;
            n = _factorial;
        }
        uint result = 1;
        for (; n > 0 && result != 0; n--) result *= n;
        using (_bql.Acquire())
        {
            if (!MayFinish || (_status & StatusComputing) == 0) return;
            (_factorial, _status) = (result, _status & ~StatusComputing);
            if ((_status & StatusInterrupt) != 0) Raise(FactorialInterrupt);
        }
    }

    private void Transfer(byte[] bytes)
    {
        bool toMemory;
        ulong memory, local;
        int count;
        using (_bql.Acquire())
        {
            if (!MayFinish || !IsDmaRunning) return;
            toMemory = (_dmaCommand & DmaToMemory) != 0;
            (memory, local) = toMemory ? (_dmaDestination, _dmaSource) : (_dmaSource, _dmaDestination);
            count = (int)Math.Min(_dmaCount, BufferBytes);
            bool fits = local >= BufferAt && local - BufferAt <= (ulong)(BufferBytes - count) && _dmaCount <= BufferBytes;
            if (!fits) count = 0;
            if (toMemory && fits) _buffer.AsSpan((int)(local - BufferAt), count).CopyTo(bytes);
        }
        lock (_gate)
        {
            if (!_runs || _ends) return;
            _isTransferring = true;
        }
        Span<byte> part = bytes.AsSpan(0, count);
        Errno errno = toMemory ? DmaWrite(memory & _dmaMask, part) : DmaRead(memory & _dmaMask, part);
        lock (_gate)
        {
            _isTransferring = false;
            Monitor.PulseAll(_gate);
        }
        using (_bql.Acquire())
        {
            if (!MayFinish || !IsDmaRunning) return;
            if (!toMemory && count > 0 && errno == Errno.None) part.CopyTo(_buffer.AsSpan((int)(local - BufferAt)));
            bool wantsInterrupt = (_dmaCommand & DmaWantsInterrupt) != 0;
            _dmaCommand &= ~DmaRun;
            if (wantsInterrupt) Raise(DmaInterrupt);
        }
    }

    /// <summary>True if the device may change. A stopped VM's device must not: its state is being saved, or was saved.</summary>
    private bool MayFinish
    {
        get { lock (_gate) return _runs && !_ends; }
    }

    private void Raise(uint interrupts)
    {
        _irqStatus |= interrupts;
        if (_irqStatus == 0) return;
        if (Msi!.IsEnabled) Msi.Notify(0);
        else SetIntx(true);
    }

    private void Acknowledge(uint interrupts)
    {
        _irqStatus &= ~interrupts;
        if (_irqStatus == 0 && !Msi!.IsEnabled) SetIntx(false);
    }
}

/// <summary><c>edu,dma_mask=N,addr=SLOT</c>.</summary>
public sealed class EduDeviceFactory : IDeviceFactory
{
    public string TypeName => "edu";

    public string Summary => "QEMU's teaching device, with a factorial, interrupts and a DMA engine";

    public IReadOnlyList<IVmStateDescription> Descriptions => [EduDevice.Description];

    [SuppressMessage("Reliability", "CA2000", Justification = "the caller owns the device")]
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new EduDevice(options, services);
}

/// <summary>Adds the device type <c>edu</c>.</summary>
public sealed class EduPlugin : IVmmPlugin
{
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddDevice<EduDeviceFactory>();
    }
}
