using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Lab;

/// <summary>Uses mtty's serial ports (16550s in BAR 0 and 1) as a guest does. Each port puts the bytes sent into its own receive FIFO.</summary>
internal static class Uart
{
    private const ulong Data = 0, InterruptEnable = 1, FifoControl = 2, LineControl = 3, ModemControl = 4, LineStatus = 5, Scratch = 7;

    /// <summary>Sets registers of both ports and leaves five bytes in each FIFO.</summary>
    /// <returns>The bytes that <see cref="Observe"/> must return.</returns>
    internal static byte[] Change(IVfioDeviceIo device) => Change(device, 0);

    /// <summary>As <see cref="Change(IVfioDeviceIo)"/>, with other values for another seed.</summary>
    internal static byte[] Change(IVfioDeviceIo device, int seed)
    {
        var expected = new List<byte>();
        for (uint port = 0; port < 2; port++)
        {
            Drain(device, port);
            Write(device, port, FifoControl, 0xc1);
            byte[] registers = [(byte)(port + 3), (byte)(0x0b - port), (byte)(0x5a + port + seed)];
            Write(device, port, LineControl, registers[0]);
            Write(device, port, ModemControl, registers[1]);
            Write(device, port, Scratch, registers[2]);
            Write(device, port, InterruptEnable, 0);
            byte[] sent = [.. "hello"u8.ToArray().Select(b => (byte)(b + port + seed))];
            foreach (byte b in sent) Write(device, port, Data, b);
            expected.AddRange([.. registers, .. sent]);
        }
        return [.. expected];
    }

    /// <summary>Reads registers and FIFO of both ports, which empties the FIFOs.</summary>
    internal static byte[] Observe(IVfioDeviceIo device)
    {
        var seen = new List<byte>();
        for (uint port = 0; port < 2; port++)
        {
            seen.AddRange([Read(device, port, LineControl), Read(device, port, ModemControl), Read(device, port, Scratch)]);
            seen.AddRange(Drain(device, port));
        }
        return [.. seen];
    }

    private static List<byte> Drain(IVfioDeviceIo device, uint port)
    {
        var bytes = new List<byte>();
        // Bit 0 of the line status: data ready.
        while ((Read(device, port, LineStatus) & 1) != 0 && bytes.Count < 64) bytes.Add(Read(device, port, Data));
        return bytes;
    }

    private static byte Read(IVfioDeviceIo device, uint port, ulong register)
    {
        byte[] value = new byte[1];
        Assert.That(device.RegionRead(port, register, value), Is.EqualTo(Errno.None));
        return value[0];
    }

    private static void Write(IVfioDeviceIo device, uint port, ulong register, byte value) =>
        Assert.That(device.RegionWrite(port, register, [value]), Is.EqualTo(Errno.None));
}
