namespace Vmm.Core.Devices;

/// <summary>The far end of a serial line (QEMU: a chardev).</summary>
internal interface ISerialLine
{
    /// <summary>Takes one byte from the port. BQL: held.</summary>
    /// <param name="value">The byte.</param>
    /// <returns>False for "not now"; the port keeps the byte until <see cref="Serial16550.RetryTransmit"/>.</returns>
    bool TryWrite(byte value);

    /// <summary>The guest has made room: see <see cref="Serial16550.ReceiveRoom"/>. BQL: held.</summary>
    void OnReceiveRoom();
}
