using Vmm.Core.VmStates;
using static Vmm.Core.Devices.Serial16550Bits;

namespace Vmm.Core.Devices;

internal sealed partial class Serial16550
{
    /// <summary>
    /// QEMU's <c>vmstate_serial</c>: the registers, and bytes and timers in flight in subsections, so that any version loads an idle port.
    /// </summary>
    public static VmStateDescription<Serial16550> Description { get; } = new()
    {
        Name = "serial",
        VersionId = 3,
        MinimumVersionId = 2,
        Fields =
        [
            VmState.UInt16<Serial16550>("divider", static s => ref s._divider, since: 2),
            VmState.UInt8<Serial16550>("rbr", static s => ref s._rbr),
            VmState.UInt8<Serial16550>("ier", static s => ref s._ier),
            VmState.UInt8<Serial16550>("iir", static s => ref s._iir),
            VmState.UInt8<Serial16550>("lcr", static s => ref s._lcr),
            VmState.UInt8<Serial16550>("mcr", static s => ref s._mcr),
            VmState.UInt8<Serial16550>("lsr", static s => ref s._lsr),
            VmState.UInt8<Serial16550>("msr", static s => ref s._msr),
            VmState.UInt8<Serial16550>("scr", static s => ref s._scr),
            VmState.UInt8<Serial16550>("fcr_vmstate", static s => ref s._fcr, since: 3),
        ],
        Subsections =
        [
            Sub("thr_ipending", static s => s.IsThrInterruptHidden, VmState.Int32<Serial16550>("thr_ipending", static s => ref s._thrInterruptPending)),
            Sub("tsr", static s => s._tsrRetry != 0,
                VmState.UInt32<Serial16550>("tsr_retry", static s => ref s._tsrRetry),
                VmState.UInt8<Serial16550>("thr", static s => ref s._thr),
                VmState.UInt8<Serial16550>("tsr", static s => ref s._tsr)),
            Sub("recv_fifo", static s => !s._receiveFifo.IsEmpty, VmState.Struct<Serial16550, Fifo8>("recv_fifo", Fifo8.Description, static s => s._receiveFifo, since: 1)),
            Sub("xmit_fifo", static s => !s._transmitFifo.IsEmpty, VmState.Struct<Serial16550, Fifo8>("xmit_fifo", Fifo8.Description, static s => s._transmitFifo, since: 1)),
            Sub("fifo_timeout_timer", static s => s._fifoTimeoutTimer.IsPending,
                VmState.Timer<Serial16550>("fifo_timeout_timer", static s => ref s._fifoTimeoutTimer.ExpiryNs)),
            Sub("timeout_ipending", static s => s._timeoutInterruptPending != 0,
                VmState.Int32<Serial16550>("timeout_ipending", static s => ref s._timeoutInterruptPending)),
            Sub("poll", static s => s._pollModemStatus >= 0,
                VmState.Int32<Serial16550>("poll_msl", static s => ref s._pollModemStatus),
                VmState.Timer<Serial16550>("modem_status_poll", static s => ref s._modemStatusPoll.ExpiryNs)),
        ],
        PreLoad = static s => s.BeforeLoad(),
        PostLoad = static (s, version) => s.AfterLoad(version),
    };

    /// <summary>
    /// True if IIR does not show the pending interrupt. While the interrupt is disabled the value need not migrate, because enabling computes it again.
    /// </summary>
    private bool IsThrInterruptHidden =>
        (_ier & IerTransmitEmpty) != 0 && (_thrInterruptPending != 0) != ((_iir & IirIdMask) == IirTransmitEmpty);

    private static VmStateDescription<Serial16550> Sub(string name, Func<Serial16550, bool> needed, params VmStateField<Serial16550>[] fields) =>
        new() { Name = $"serial/{name}", Needed = needed, Fields = fields };

    private void BeforeLoad()
    {
        ResetHidden();
        _thrInterruptPending = -1;
        _thr = _tsr = 0;
    }

    private void AfterLoad(int version)
    {
        if (version < 3) _fcr = 0;
        if (_thrInterruptPending == -1) _thrInterruptPending = (_iir & IirIdMask) == IirTransmitEmpty ? 1 : 0;
        bool isTransmitterEmpty = (_lsr & LsrTransmitterEmpty) != 0;
        if (_tsrRetry != 0 == isTransmitterEmpty)
            throw new InvalidDataException($"expected LSR.TEMT {(_tsrRetry == 0 ? "set" : "clear")} with tsr_retry {_tsrRetry}, found LSR 0x{_lsr:x2}");
        _tsrRetry = Math.Min(_tsrRetry, MaxTransmitRetries);
        SetFifoControl(_fcr);
        UpdateParameters();
        // The interrupt controller loads the level of the line itself; this is only the port's copy.
        _irqRaised = (_iir & IirNoInterrupt) == 0;
    }
}
