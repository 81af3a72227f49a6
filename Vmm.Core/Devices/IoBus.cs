using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>A device's registers on a bus. BQL: held for every call.</summary>
public interface IIoHandler
{
    /// <summary>A guest's read.</summary>
    /// <param name="offset">From the start of the device's range.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the range.</param>
    /// <returns>The value; bits beyond the size are ignored.</returns>
    ulong Read(ulong offset, int size);

    /// <summary>A guest's write.</summary>
    /// <param name="offset">From the start of the device's range.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the range.</param>
    /// <param name="value">The value.</param>
    void Write(ulong offset, int size, ulong value);
}

/// <summary>
/// What the vCPUs of one VM reach besides RAM: I/O ports and memory-mapped registers. Ranges are exclusive; what no device has goes to the PCI
/// bus, whose BARs the guest moves. Looking up takes no lock; adding and removing need the BQL (QEMU: <c>address_space_io</c>).
/// </summary>
/// <param name="bql">The VM's lock.</param>
/// <param name="pci">Answers what no range holds.</param>
public sealed class IoBus(Bql bql, PciHost pci)
{
    private volatile Range[] _ports = [];
    private volatile Range[] _mmio = [];

    private sealed record Range(ulong First, ulong Last, string Owner, IIoHandler Handler);

    /// <summary>Gives a device I/O ports.</summary>
    /// <param name="port">First port.</param>
    /// <param name="count">Number of ports.</param>
    /// <param name="owner">The device, for errors.</param>
    /// <param name="handler">Its registers.</param>
    /// <returns>Dispose to take them away.</returns>
    /// <exception cref="ConfigurationException">Another device has one of them.</exception>
    public IDisposable AddPorts(ushort port, int count, string owner, IIoHandler handler) => Add(true, port, (ulong)count, owner, handler);

    /// <summary>Gives a device memory-mapped registers.</summary>
    /// <param name="range">Guest-physical range.</param>
    /// <param name="owner">The device, for errors.</param>
    /// <param name="handler">Its registers.</param>
    /// <returns>Dispose to take them away.</returns>
    /// <exception cref="ConfigurationException">Another device has part of it.</exception>
    public IDisposable AddMmio(GuestRange range, string owner, IIoHandler handler) => Add(false, range.Start.Value, range.LengthBytes, owner, handler);

    /// <summary>Whether no device has any of these ports. BQL: held.</summary>
    /// <param name="port">First port.</param>
    /// <param name="count">Number of ports.</param>
    /// <returns>True when <see cref="AddPorts"/> would succeed.</returns>
    public bool IsFree(ushort port, int count) => !Array.Exists(_ports, r => r.First <= (ulong)port + (ulong)count - 1 && port <= r.Last);

    /// <summary>A guest's read of ports. BQL: held.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4.</param>
    /// <returns>The value; all ones where nobody answers.</returns>
    public uint PioRead(ushort port, int size) =>
        Find(_ports, port, size) is { } r ? (uint)(r.Handler.Read(port - r.First, size) & PciHost.AllOnes(size)) : pci.PioRead(port, size);

    /// <summary>A guest's write to ports. BQL: held.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4.</param>
    /// <param name="value">The value.</param>
    public void PioWrite(ushort port, int size, uint value)
    {
        if (Find(_ports, port, size) is { } r) r.Handler.Write(port - r.First, size, value);
        else pci.PioWrite(port, size, value);
    }

    /// <summary>A guest's read of memory that is not RAM. BQL: held.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8.</param>
    /// <returns>The value; all ones where nobody answers.</returns>
    public ulong MmioRead(GuestAddress address, int size) =>
        Find(_mmio, address.Value, size) is { } r ? r.Handler.Read(address.Value - r.First, size) & PciHost.AllOnes(size) : pci.MmioRead(address, size);

    /// <summary>A guest's write to memory that is not RAM; ignored where nobody answers. BQL: held.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8.</param>
    /// <param name="value">The value.</param>
    public void MmioWrite(GuestAddress address, int size, ulong value)
    {
        if (Find(_mmio, address.Value, size) is { } r) r.Handler.Write(address.Value - r.First, size, value);
        else pci.MmioWrite(address, size, value);
    }

    private Registration Add(bool isPort, ulong first, ulong length, string owner, IIoHandler handler)
    {
        ArgumentNullException.ThrowIfNull(handler);
        ArgumentOutOfRangeException.ThrowIfZero(length);
        var range = new Range(first, checked(first + (length - 1)), owner, handler);
        using (bql.Acquire())
        {
            Range[] all = isPort ? _ports : _mmio;
            if (isPort && range.Last > ushort.MaxValue) throw new ConfigurationException($"device '{owner}': ports end at 0xffff, found 0x{range.Last:x}");
            if (Array.Find(all, r => r.First <= range.Last && range.First <= r.Last) is { } other)
                throw new ConfigurationException($"device '{owner}': {(isPort ? "ports" : "addresses")} 0x{range.First:x}-0x{range.Last:x} overlap 0x{other.First:x}-0x{other.Last:x} of '{other.Owner}'");
            Replace(isPort, [.. all.Append(range).OrderBy(static r => r.First)]);
        }
        return new Registration(() => { using (bql.Acquire()) Replace(isPort, [.. (isPort ? _ports : _mmio).Where(r => !ReferenceEquals(r, range))]); });
    }

    private void Replace(bool isPort, Range[] now)
    {
        if (isPort) _ports = now;
        else _mmio = now;
    }

    /// <summary>Binary search; an access that leaves its range answers like nobody's.</summary>
    private static Range? Find(Range[] all, ulong at, int size)
    {
        int low = 0, high = all.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) / 2;
            Range r = all[middle];
            if (at < r.First) high = middle - 1;
            else if (at > r.Last) low = middle + 1;
            else return r.Last - at >= (ulong)(size - 1) ? r : null;
        }
        return null;
    }
}
