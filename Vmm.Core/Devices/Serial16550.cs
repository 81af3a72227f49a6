using static Vmm.Core.Devices.Serial16550Bits;

namespace Vmm.Core.Devices;

/// <summary>
/// A 16550A serial port: registers 0 to 7, two FIFOs of 16 bytes, loopback, one interrupt line. Behaviour and state equal those of QEMU's
/// <c>serial</c>, so a guest that moves from or to QEMU notices no difference. BQL: held for every call.
/// </summary>
internal sealed partial class Serial16550 : IDisposable
{
    private const int FifoBytes = 16;
    private const int BaudBase = 115200;
    private const int UnsetDivisorBaud = 3500;
    private const uint MaxTransmitRetries = 4;

    // Connections to the VM.
    private readonly VmClock _clock;
    private readonly ISerialLine? _line;
    private readonly Action<bool>? _irq;
    private bool _irqRaised;

    // Parts with a state of their own.
    private readonly Fifo8 _receiveFifo = new(FifoBytes);
    private readonly Fifo8 _transmitFifo = new(FifoBytes);
    private readonly VmTimer _fifoTimeoutTimer;
    private readonly VmTimer _modemStatusPoll;

    // Registers and other migrated state.
    private ushort _divider;
    private byte _rbr, _thr, _tsr, _ier, _iir, _lcr, _mcr, _lsr, _msr, _scr, _fcr;
    private int _thrInterruptPending;
    private int _timeoutInterruptPending;
    private uint _tsrRetry;
    private int _pollModemStatus;

    // Computed from the registers.
    private int _receiveTrigger = 1;
    private long _charTransmitNs;

    /// <summary>Makes a port in its power-on state.</summary>
    /// <param name="clock">Clock for the character timeout.</param>
    /// <param name="line">The other end of the line; null drops what the guest sends.</param>
    /// <param name="irq">Called with each change of the interrupt line, or null.</param>
    public Serial16550(VmClock clock, ISerialLine? line = null, Action<bool>? irq = null)
    {
        ArgumentNullException.ThrowIfNull(clock);
        _clock = clock;
        _line = line;
        _irq = irq;
        _fifoTimeoutTimer = clock.CreateTimer(OnFifoTimeout);
        _modemStatusPoll = clock.CreateTimer(UpdateModemStatus);
        Reset();
    }

    /// <summary>True while the interrupt line is asserted.</summary>
    public bool IsIrqRaised => _irqRaised;

    /// <summary>Number of bytes that <see cref="Receive"/> can take now without an overrun and without passing the guest's trigger level.</summary>
    public int ReceiveRoom
    {
        get
        {
            if ((_fcr & FcrEnable) == 0) return (_lsr & LsrDataReady) == 0 ? 1 : 0;
            if (_receiveFifo.IsFull) return 0;
            return _receiveFifo.Count <= _receiveTrigger ? _receiveTrigger - _receiveFifo.Count : 1;
        }
    }

    /// <summary>Reads a register.</summary>
    /// <param name="register">0 to 7.</param>
    /// <returns>Its value; a read has the side effects that the data sheet describes.</returns>
    public byte ReadRegister(int register)
    {
        switch (register)
        {
            case 0: return IsDivisorLatched ? (byte)_divider : ReadReceived();
            case 1: return IsDivisorLatched ? (byte)(_divider >> 8) : _ier;
            case 2:
                byte iir = _iir;
                if ((iir & IirIdMask) == IirTransmitEmpty)
                {
                    _thrInterruptPending = 0;
                    UpdateIrq();
                }
                return iir;
            case 3: return _lcr;
            case 4: return _mcr;
            case 5:
                byte lsr = _lsr;
                if ((lsr & (LsrBreak | LsrOverrun)) != 0)
                {
                    _lsr &= unchecked((byte)~(LsrBreak | LsrOverrun));
                    UpdateIrq();
                }
                return lsr;
            case 6: return ReadModemStatus();
            case 7: return _scr;
            default: throw new ArgumentOutOfRangeException(nameof(register), register, "a 16550 has registers 0 to 7");
        }
    }

    /// <summary>Writes a register.</summary>
    /// <param name="register">0 to 7; writes to 5 and 6 are ignored.</param>
    /// <param name="value">The new value.</param>
    public void WriteRegister(int register, byte value)
    {
        switch (register)
        {
            case 0 when IsDivisorLatched:
                _divider = (ushort)((_divider & 0xff00) | value);
                UpdateParameters();
                break;
            case 0:
                Transmit(value);
                break;
            case 1 when IsDivisorLatched:
                _divider = (ushort)((_divider & 0x00ff) | (value << 8));
                UpdateParameters();
                break;
            case 1:
                WriteInterruptEnable(value);
                break;
            case 2:
                WriteFifoControl(value);
                break;
            case 3:
                _lcr = value;
                UpdateParameters();
                break;
            case 4:
                WriteModemControl(value);
                break;
            case 5 or 6:
                break;
            case 7:
                _scr = value;
                break;
            default: throw new ArgumentOutOfRangeException(nameof(register), register, "a 16550 has registers 0 to 7");
        }
    }

    /// <summary>Receives bytes from the line. More than <see cref="ReceiveRoom"/> may overrun, which the guest sees.</summary>
    public void Receive(ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty) return;
        if ((_fcr & FcrEnable) != 0)
        {
            foreach (byte b in bytes) PushReceived(b);
            StartFifoTimeout();
        }
        else
        {
            if ((_lsr & LsrDataReady) != 0 || bytes.Length > 1) _lsr |= LsrOverrun;
            _rbr = bytes[^1];
        }
        _lsr |= LsrDataReady;
        UpdateIrq();
    }

    /// <summary>Receives a break from the line.</summary>
    public void ReceiveBreak()
    {
        _rbr = 0;
        PushReceived(0);
        _lsr |= LsrBreak | LsrDataReady;
        UpdateIrq();
    }

    /// <summary>Sends the bytes that the line refused before; the line calls it when it can take bytes again.</summary>
    public void RetryTransmit()
    {
        if (_tsrRetry > 0) RunTransmitter();
    }

    /// <summary>Sets the power-on state: 9600 baud, 8N1, no FIFO, no interrupts.</summary>
    public void Reset()
    {
        _rbr = _thr = _tsr = _ier = _lcr = _scr = _fcr = 0;
        _iir = IirNoInterrupt;
        _lsr = LsrTransmitterEmpty | LsrTransmitHoldingEmpty;
        _msr = MsrDcd | MsrDsr | MsrCts;
        _divider = BaudBase / 9600;
        _mcr = McrOut2;
        _receiveTrigger = 1;
        ResetHidden();
        UpdateParameters();
        UpdateIrq();
    }

    /// <summary>Stops the port's timers.</summary>
    public void Dispose()
    {
        _fifoTimeoutTimer.Dispose();
        _modemStatusPoll.Dispose();
    }

    private bool IsDivisorLatched => (_lcr & LcrDivisorLatch) != 0;

    /// <summary>Resets the state that the stream carries only if it differs from this.</summary>
    private void ResetHidden()
    {
        _tsrRetry = 0;
        _thrInterruptPending = _timeoutInterruptPending = 0;
        // Our lines have no modem signals, so there is nothing to poll.
        _pollModemStatus = -1;
        _fifoTimeoutTimer.Del();
        _modemStatusPoll.Del();
        _receiveFifo.Reset();
        _transmitFifo.Reset();
    }

    private void UpdateIrq()
    {
        byte id = PendingInterrupt();
        _iir = (byte)(id | (_iir & 0xf0));
        bool raised = id != IirNoInterrupt;
        if (raised == _irqRaised) return;
        _irqRaised = raised;
        _irq?.Invoke(raised);
    }

    /// <summary>Returns the pending interrupt of the highest priority, in the data sheet's order; the timeout has priority over received data.</summary>
    private byte PendingInterrupt()
    {
        if ((_ier & IerLineStatus) != 0 && (_lsr & LsrInterrupting) != 0) return IirLineStatus;
        if ((_ier & IerReceiveData) != 0 && _timeoutInterruptPending != 0) return IirTimeout;
        bool isTriggered = (_fcr & FcrEnable) == 0 || _receiveFifo.Count >= _receiveTrigger;
        if ((_ier & IerReceiveData) != 0 && (_lsr & LsrDataReady) != 0 && isTriggered) return IirReceiveData;
        if ((_ier & IerTransmitEmpty) != 0 && _thrInterruptPending != 0) return IirTransmitEmpty;
        if ((_ier & IerModemStatus) != 0 && (_msr & MsrAnyDelta) != 0) return IirModemStatus;
        return IirNoInterrupt;
    }

    private byte ReadReceived()
    {
        byte value;
        if ((_fcr & FcrEnable) != 0)
        {
            value = _receiveFifo.IsEmpty ? (byte)0 : _receiveFifo.Pop();
            if (_receiveFifo.IsEmpty) _lsr &= unchecked((byte)~(LsrDataReady | LsrBreak));
            else StartFifoTimeout();
            _timeoutInterruptPending = 0;
        }
        else
        {
            value = _rbr;
            _lsr &= unchecked((byte)~(LsrDataReady | LsrBreak));
        }
        UpdateIrq();
        if ((_mcr & McrLoop) == 0) _line?.OnReceiveRoom();
        return value;
    }

    private void PushReceived(byte value)
    {
        // An overrun drops the new byte.
        if (_receiveFifo.IsFull) _lsr |= LsrOverrun;
        else _receiveFifo.Push(value);
    }

    private void StartFifoTimeout() => _fifoTimeoutTimer.Mod(_clock.NowNs + 4 * _charTransmitNs);

    private void OnFifoTimeout()
    {
        if (_receiveFifo.IsEmpty) return;
        _timeoutInterruptPending = 1;
        UpdateIrq();
    }

    private void Transmit(byte value)
    {
        _thr = value;
        if ((_fcr & FcrEnable) != 0)
        {
            // An overrun drops the oldest byte.
            if (_transmitFifo.IsFull) _transmitFifo.Pop();
            _transmitFifo.Push(value);
        }
        _thrInterruptPending = 0;
        _lsr &= unchecked((byte)~(LsrTransmitHoldingEmpty | LsrTransmitterEmpty));
        UpdateIrq();
        if (_tsrRetry == 0) RunTransmitter();
    }

    private void RunTransmitter()
    {
        while (true)
        {
            if (_tsrRetry == 0) FillShiftRegister();
            if ((_mcr & McrLoop) != 0) Receive([_tsr]);
            else if (_line is not null && !_line.TryWrite(_tsr) && _tsrRetry < MaxTransmitRetries)
            {
                _tsrRetry++;
                return;
            }
            _tsrRetry = 0;
            if ((_lsr & LsrTransmitHoldingEmpty) != 0) break;
        }
        _lsr |= LsrTransmitterEmpty;
    }

    private void FillShiftRegister()
    {
        if ((_fcr & FcrEnable) == 0) _tsr = _thr;
        else if (!_transmitFifo.IsEmpty) _tsr = _transmitFifo.Pop();
        if ((_fcr & FcrEnable) == 0 || _transmitFifo.IsEmpty) _lsr |= LsrTransmitHoldingEmpty;
        if ((_lsr & LsrTransmitHoldingEmpty) == 0 || _thrInterruptPending != 0) return;
        _thrInterruptPending = 1;
        UpdateIrq();
    }

    private void WriteInterruptEnable(byte value)
    {
        byte changed = (byte)((_ier ^ value) & IerAll);
        _ier = (byte)(value & IerAll);
        if ((changed & IerModemStatus) != 0 && _pollModemStatus >= 0) UpdateModemStatus();
        // Guests expect an interrupt when they enable it while the register is empty, even if a read of IIR has cleared it before.
        if ((changed & IerTransmitEmpty) != 0)
            _thrInterruptPending = (_ier & IerTransmitEmpty) != 0 && (_lsr & LsrTransmitHoldingEmpty) != 0 ? 1 : 0;
        if (changed != 0) UpdateIrq();
    }

    private void WriteFifoControl(byte value)
    {
        if (((value ^ _fcr) & FcrEnable) != 0) value |= FcrResetTransmit | FcrResetReceive;
        if ((value & FcrResetReceive) != 0)
        {
            _lsr &= unchecked((byte)~(LsrDataReady | LsrBreak));
            _fifoTimeoutTimer.Del();
            _timeoutInterruptPending = 0;
            _receiveFifo.Reset();
        }
        if ((value & FcrResetTransmit) != 0)
        {
            _lsr |= LsrTransmitHoldingEmpty;
            _thrInterruptPending = 1;
            _transmitFifo.Reset();
        }
        SetFifoControl((byte)(value & FcrKept));
        UpdateIrq();
        if ((value & FcrResetReceive) != 0) _line?.OnReceiveRoom();
    }

    private void SetFifoControl(byte value)
    {
        _fcr = value;
        if ((value & FcrEnable) == 0)
        {
            _iir &= unchecked((byte)~IirFifoEnabled);
            return;
        }
        _iir |= IirFifoEnabled;
        _receiveTrigger = (value >> 6) switch
        {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
    }

    private void WriteModemControl(byte value)
    {
        byte before = _mcr;
        _mcr = (byte)(value & McrAll);
        if ((value & McrLoop) == 0 && _pollModemStatus >= 0 && before != _mcr) _modemStatusPoll.Mod(_clock.NowNs + _charTransmitNs);
    }

    private byte ReadModemStatus()
    {
        if ((_mcr & McrLoop) != 0)
        {
            // Outputs are wired to inputs: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
            return (byte)(((_mcr & (McrOut1 | McrOut2)) << 4) | ((_mcr & McrRts) << 3) | ((_mcr & McrDtr) << 5));
        }
        if (_pollModemStatus >= 0) UpdateModemStatus();
        byte value = _msr;
        if ((value & MsrAnyDelta) != 0)
        {
            _msr &= 0xf0;
            UpdateIrq();
        }
        return value;
    }

    /// <summary>Ends polling that a peer had switched on, because the line has no modem signals.</summary>
    private void UpdateModemStatus()
    {
        _modemStatusPoll.Del();
        _pollModemStatus = -1;
    }

    private void UpdateParameters()
    {
        bool hasParity = (_lcr & 0x08) != 0;
        int stopBits = (_lcr & 0x04) != 0 ? 2 : 1;
        int frameBits = 1 + (_lcr & 0x03) + 5 + (hasParity ? 1 : 0) + stopBits;
        double baud = _divider == 0 ? UnsetDivisorBaud : (double)BaudBase / _divider;
        _charTransmitNs = (long)(1e9 / baud * frameBits);
    }
}
