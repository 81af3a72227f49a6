using System.Buffers.Binary;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Hosted;

// Splits accesses of any length into accesses that a CPU could make.
public sealed partial class PciDeviceBackend
{
    /// <inheritdoc/>
    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        LetSaveGoOn();
        Span<byte> all = destination, bytes = stackalloc byte[8];
        for (ulong at = offset; destination.Length > 0;)
        {
            int n = Width(index, at, destination.Length);
            ulong value = index == VfioPciRegion.Config ? ReadConfig((int)at, n) : _vm.Function.Read((int)index, at, n);
            BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
            bytes[..n].CopyTo(destination);
            destination = destination[n..];
            at += (uint)n;
        }
        ShowPending(index, offset, all);
    }

    /// <inheritdoc/>
    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        LetSaveGoOn();
        Span<byte> bytes = stackalloc byte[8];
        while (source.Length > 0)
        {
            int n = Width(index, offset, source.Length);
            bytes.Clear();
            source[..n].CopyTo(bytes);
            ulong value = BinaryPrimitives.ReadUInt64LittleEndian(bytes);
            if (index == VfioPciRegion.Config) WriteConfig((int)offset, n, (uint)value);
            else _vm.Function.Write((int)index, offset, n, value);
            source = source[n..];
            offset += (uint)n;
        }
    }

    /// <summary>Passes 1, 2, 4 or 8 bytes on as one access and splits longer ones into the widest aligned pieces.</summary>
    private static int Width(uint index, ulong offset, int length)
    {
        int widest = index == VfioPciRegion.Config ? 4 : 8;
        if (length <= widest && int.IsPow2(length)) return length;
        int n = widest;
        while (n > length || (offset & (uint)(n - 1)) != 0) n /= 2;
        return n;
    }

    private uint ReadConfig(int offset, int size)
    {
        using (_vm.Vm.Bql.Acquire()) return _vm.Function.ConfigRead(offset, size);
    }

    private void WriteConfig(int offset, int size, uint value)
    {
        using (_vm.Vm.Bql.Acquire()) _vm.Function.ConfigWrite(offset, size, value);
        FollowBusMaster();
    }

    /// <summary>Answers the MSI-X pending bits from the interrupts, because a vector is pending when the client has masked it or bound no eventfd.</summary>
    private void ShowPending(uint index, ulong offset, Span<byte> bytes)
    {
        if (_vm.Function.Msix is not { } msix || index != (uint)msix.Layout.PbaBar) return;
        for (int v = 0; v < msix.Vectors; v += 8)
        {
            ulong at = msix.Layout.PbaOffset + (ulong)(v / 8);
            if (at < offset || at >= offset + (uint)bytes.Length) continue;
            byte pending = 0;
            for (int bit = 0; bit < 8 && v + bit < msix.Vectors; bit++) pending |= (byte)(_host.Irqs.IsPending(VfioPciIrq.Msix, (uint)(v + bit)) ? 1 << bit : 0);
            bytes[(int)(at - offset)] = pending;
        }
    }
}
