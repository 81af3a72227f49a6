using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Lab;

/// <summary>Uses QEMU's edu as a driver does: it has an identification, an interrupt on demand, and a DMA engine with its own buffer.</summary>
internal sealed class LabEdu(IVfioDeviceIo device)
{
    internal const uint Identification = 0x010000ed;
    private const ulong RaiseInterrupt = 0x60, AcknowledgeInterrupt = 0x64, DmaSource = 0x80, DmaDestination = 0x88, DmaCount = 0x90, DmaCommand = 0x98, Buffer = 0x40000;

    /// <summary>Enables memory space and bus master.</summary>
    internal void Enable() => Assert.That(device.RegionWrite(VfioPciRegion.Config, 4, [6, 0]), Is.EqualTo(Errno.None));

    /// <summary>Makes the device raise its interrupt.</summary>
    internal void Raise() => Write(RaiseInterrupt, 1, 4);

    /// <summary>Acknowledges the interrupt, which lowers the device's pin.</summary>
    internal void Acknowledge() => Write(AcknowledgeInterrupt, 1, 4);

    /// <summary>Makes the device copy memory by DMA, through its buffer.</summary>
    internal void Copy(ulong from, ulong to, ulong count)
    {
        Dma(from, Buffer, count, fromDevice: false);
        CopyFromBuffer(to, count);
    }

    /// <summary>Makes the device write its buffer to memory by DMA.</summary>
    internal void CopyFromBuffer(ulong to, ulong count) => Dma(Buffer, to, count, fromDevice: true);

    private void Dma(ulong source, ulong destination, ulong count, bool fromDevice)
    {
        Write(DmaSource, source, 8);
        Write(DmaDestination, destination, 8);
        Write(DmaCount, count, 8);
        Write(DmaCommand, fromDevice ? 3u : 1u, 8);
        byte[] command = new byte[8];
        long deadline = Environment.TickCount64 + 30_000;
        do Assert.That(device.RegionRead(0, DmaCommand, command), Is.EqualTo(Errno.None));
        while ((command[0] & 1) != 0 && Environment.TickCount64 < deadline);
        Assert.That(command[0] & 1, Is.Zero, "the transfer ended");
    }

    private void Write(ulong register, ulong value, int width)
    {
        byte[] bytes = new byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        Assert.That(device.RegionWrite(0, register, bytes.AsSpan(0, width)), Is.EqualTo(Errno.None));
    }
}
