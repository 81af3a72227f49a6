namespace Vmm.Core.Devices;

/// <summary>The other end of a serial line (QEMU: a chardev).</summary>
internal interface ISerialLine
{
    /// <summary>Takes one byte that the port sends. BQL: held.</summary>
    /// <returns>False if the line cannot take it now; the port keeps the byte until <see cref="Serial16550.RetryTransmit"/>.</returns>
    bool TryWrite(byte value);

    /// <summary>The guest has read bytes, so that <see cref="Serial16550.ReceiveRoom"/> has grown. BQL: held.</summary>
    void OnReceiveRoom();
}
