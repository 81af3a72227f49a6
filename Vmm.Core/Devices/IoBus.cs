using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>Answers accesses to a device's registers. BQL: held for every call.</summary>
public interface IIoHandler
{
    /// <summary>Handles a guest's read.</summary>
    /// <param name="offset">Offset in the device's range, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the range.</param>
    /// <returns>The value; bits beyond the size are ignored.</returns>
    ulong Read(ulong offset, int size);

    /// <summary>Handles a guest's write.</summary>
    /// <param name="offset">Offset in the device's range, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the range.</param>
    /// <param name="value">Little-endian.</param>
    void Write(ulong offset, int size, ulong value);
}

/// <summary>
/// The I/O ports and memory-mapped registers of one VM. Each range belongs to one device; all other accesses go to the PCI bus, whose BARs the guest
/// moves. A lookup takes no lock; adding and removing need the BQL (QEMU: <c>address_space_io</c>).
/// </summary>
/// <param name="bql">Lock of the VM.</param>
/// <param name="pci">Answers accesses outside all ranges.</param>
public sealed class IoBus(Bql bql, PciHost pci)
{
    private volatile Range[] _ports = [];
    private volatile Range[] _mmio = [];

    private sealed record Range(ulong First, ulong Last, string Owner, IIoHandler Handler);

    /// <summary>Adds I/O ports of a device.</summary>
    /// <param name="port">First port.</param>
    /// <param name="count">Number of ports.</param>
    /// <param name="owner">Id of the device, for error messages.</param>
    /// <param name="handler">Answers accesses to the ports.</param>
    /// <returns>Dispose to remove them.</returns>
    /// <exception cref="ConfigurationException">Another device has one of the ports, or they end after 0xffff.</exception>
    public IDisposable AddPorts(ushort port, int count, string owner, IIoHandler handler) => Add(true, port, (ulong)count, owner, handler);

    /// <summary>Adds memory-mapped registers of a device.</summary>
    /// <param name="range">Guest-physical range.</param>
    /// <param name="owner">Id of the device, for error messages.</param>
    /// <param name="handler">Answers accesses to the range.</param>
    /// <returns>Dispose to remove them.</returns>
    /// <exception cref="ConfigurationException">Another device has part of the range.</exception>
    public IDisposable AddMmio(GuestRange range, string owner, IIoHandler handler) => Add(false, range.Start.Value, range.LengthBytes, owner, handler);

    /// <summary>True if no device has any of these ports, so that <see cref="AddPorts"/> would succeed. BQL: held.</summary>
    public bool IsFree(ushort port, int count) => !Array.Exists(_ports, r => r.First <= (ulong)port + (ulong)count - 1 && port <= r.Last);

    /// <summary>Handles a guest's read of I/O ports. BQL: held.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <returns>The value; all ones if no device answers.</returns>
    public uint PioRead(ushort port, int size) =>
        Find(_ports, port, size) is { } r ? (uint)(r.Handler.Read(port - r.First, size) & PciHost.AllOnes(size)) : pci.PioRead(port, size);

    /// <summary>Handles a guest's write to I/O ports. BQL: held.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void PioWrite(ushort port, int size, uint value)
    {
        if (Find(_ports, port, size) is { } r) r.Handler.Write(port - r.First, size, value);
        else pci.PioWrite(port, size, value);
    }

    /// <summary>Handles a guest's read of memory that is not RAM. BQL: held.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <returns>The value; all ones if no device answers.</returns>
    public ulong MmioRead(GuestAddress address, int size) =>
        Find(_mmio, address.Value, size) is { } r ? r.Handler.Read(address.Value - r.First, size) & PciHost.AllOnes(size) : pci.MmioRead(address, size);

    /// <summary>Handles a guest's write to memory that is not RAM; does nothing if no device answers. BQL: held.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <param name="value">Little-endian.</param>
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

    /// <summary>Finds the range that holds a whole access; null if no range does.</summary>
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
