namespace Vmm.Core.Devices;

/// <summary>Bits of the 16550A's registers, with the names of its data sheet.</summary>
internal static class Serial16550Bits
{
    internal const byte IerReceiveData = 0x01, IerTransmitEmpty = 0x02, IerLineStatus = 0x04, IerModemStatus = 0x08, IerAll = 0x0f;

    internal const byte IirNoInterrupt = 0x01, IirIdMask = 0x06, IirModemStatus = 0x00, IirTransmitEmpty = 0x02, IirReceiveData = 0x04,
        IirLineStatus = 0x06, IirTimeout = 0x0c, IirFifoEnabled = 0xc0;

    internal const byte FcrEnable = 0x01, FcrResetReceive = 0x02, FcrResetTransmit = 0x04, FcrKept = 0xc9;

    internal const byte LcrBreak = 0x40, LcrDivisorLatch = 0x80;

    internal const byte McrDtr = 0x01, McrRts = 0x02, McrOut1 = 0x04, McrOut2 = 0x08, McrLoop = 0x10, McrAll = 0x1f;

    internal const byte LsrDataReady = 0x01, LsrOverrun = 0x02, LsrBreak = 0x10, LsrTransmitHoldingEmpty = 0x20, LsrTransmitterEmpty = 0x40,
        LsrInterrupting = 0x1e;

    internal const byte MsrAnyDelta = 0x0f, MsrCts = 0x10, MsrDsr = 0x20, MsrRi = 0x40, MsrDcd = 0x80;
}
