using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Lab;

/// <summary>BAR 0 of a device of our module: the first page of its state.</summary>
internal static class LabMemory
{
    private const int Bytes = 4096;

    internal static byte[] Fill(IVfioDeviceIo device, int seed)
    {
        byte[] bytes = new byte[Bytes];
        new Random(seed).NextBytes(bytes);
        for (int at = 0; at < Bytes; at += 256) Assert.That(device.RegionWrite(VfioPciRegion.Bar0, (ulong)at, bytes.AsSpan(at, 256)), Is.EqualTo(Errno.None));
        return bytes;
    }

    internal static byte[] Read(IVfioDeviceIo device)
    {
        byte[] bytes = new byte[Bytes];
        for (int at = 0; at < Bytes; at += 256) Assert.That(device.RegionRead(VfioPciRegion.Bar0, (ulong)at, bytes.AsSpan(at, 256)), Is.EqualTo(Errno.None));
        return bytes;
    }
}
