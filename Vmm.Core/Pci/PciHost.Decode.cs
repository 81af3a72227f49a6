using Vmm.Core.Memory;

namespace Vmm.Core.Pci;

// Guest accesses. An immutable sorted array holds the mapped BARs; a change replaces the array, so that a lookup needs no lock.
public sealed partial class PciHost
{
    private volatile Mapping[] _mmio = [];
    private volatile Mapping[] _pio = [];

    /// <summary>The address range that a BAR decodes; both ends inclusive.</summary>
    private sealed record Mapping(ulong First, ulong Last, PciDevice Device, int Bar);

    /// <summary>Handles a guest's read of I/O ports: configuration registers and I/O BARs.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <returns>The value; all ones if no function answers.</returns>
    public uint PioRead(ushort port, int size)
    {
        CheckSize(size, 4);
        if (port is >= ConfigAddressPort and < ConfigAddressPort + 4)
        {
            using (bql.Acquire()) return (uint)(_configReg >> (8 * (port - ConfigAddressPort)) & AllOnes(size));
        }
        if (port is >= ConfigDataPort and < ConfigDataPort + 4)
        {
            using (bql.Acquire())
                return ConfigTarget(port, size, out ushort bdf, out int offset) ? ConfigRead(bdf, offset, size) : (uint)AllOnes(size);
        }
        return (uint)Read(_pio, port, size);
    }

    /// <summary>Handles a guest's write to I/O ports: configuration registers and I/O BARs. The address register takes only whole u32 values.</summary>
    /// <param name="port">First port.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void PioWrite(ushort port, int size, uint value)
    {
        CheckSize(size, 4);
        if (port is >= ConfigAddressPort and < ConfigAddressPort + 4)
        {
            if (port != ConfigAddressPort || size != 4) return;
            using (bql.Acquire()) _configReg = value;
        }
        else if (port is >= ConfigDataPort and < ConfigDataPort + 4)
        {
            using (bql.Acquire())
                if (ConfigTarget(port, size, out ushort bdf, out int offset)) ConfigWrite(bdf, offset, size, value);
        }
        else
        {
            Write(_pio, port, size, value);
        }
    }

    /// <summary>Handles a guest's read of memory that is not RAM.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <returns>The value; all ones if no function answers.</returns>
    public ulong MmioRead(GuestAddress address, int size)
    {
        CheckSize(size, 8);
        return Read(_mmio, address.Value, size);
    }

    /// <summary>Handles a guest's write to memory that is not RAM; does nothing if no function answers.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void MmioWrite(GuestAddress address, int size, ulong value)
    {
        CheckSize(size, 8);
        Write(_mmio, address.Value, size, value);
    }

    /// <summary>Handles a guest's read of configuration space. The bus is conventional, so a function has 256 bytes.</summary>
    /// <param name="bdf">Bus, slot and function.</param>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <returns>The value; all ones if no function answers.</returns>
    public uint ConfigRead(ushort bdf, int offset, int size)
    {
        CheckSize(size, 4);
        using (bql.Acquire()) return Target(bdf, offset, size) is { } device ? (uint)(device.ConfigRead(offset, size) & AllOnes(size)) : (uint)AllOnes(size);
    }

    /// <summary>Handles a guest's write to configuration space; does nothing if no function answers.</summary>
    /// <param name="bdf">Bus, slot and function.</param>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void ConfigWrite(ushort bdf, int offset, int size, uint value)
    {
        CheckSize(size, 4);
        using (bql.Acquire()) Target(bdf, offset, size)?.ConfigWrite(offset, size, (uint)(value & AllOnes(size)));
    }

    /// <summary>Returns the value of a read that no device answers: all ones.</summary>
    /// <param name="size">1 to 8 bytes.</param>
    public static ulong AllOnes(int size) => ulong.MaxValue >> (64 - 8 * size);

    /// <summary>
    /// Rebuilds the array. If BARs overlap, the lowest slot and function answers, then the lowest BAR. This order does not depend on the order of the
    /// guest's writes, so both sides of a migration agree.
    /// </summary>
    internal void RebuildMappings()
    {
        bql.AssertHeld();
        var all = from device in Functions
                  from number in Enumerable.Range(0, PciBar.Rom + 1)
                  let bar = device.Bar(number)
                  let first = bar?.Address ?? 0
                  where first != 0
                  select (bar.IsIo, Mapping: new Mapping(first, first + (bar.SizeBytes - 1), device, number));
        var now = all.ToList();
        _mmio = [.. now.Where(static m => !m.IsIo).Select(static m => m.Mapping)];
        _pio = [.. now.Where(static m => m.IsIo).Select(static m => m.Mapping)];
    }

    private static void CheckSize(int size, int max)
    {
        if (size is not (1 or 2 or 4 or 8) || size > max) throw new ArgumentOutOfRangeException(nameof(size), $"an access of {size} bytes");
    }

    private static Mapping? FindMapping(Mapping[] all, ulong address)
    {
        foreach (Mapping m in all)
            if (address >= m.First && address <= m.Last) return m;
        return null;
    }

    /// <summary>Finds the mapping that answers a whole access. Null if no mapping answers any byte, or if the access must be split into bytes.</summary>
    private static Mapping? Owner(Mapping[] all, ulong address, int size, out bool split)
    {
        Mapping? first = FindMapping(all, address);
        split = size > 1 && !ReferenceEquals(first, FindMapping(all, address + (ulong)(size - 1)));
        return first;
    }

    private static ulong Read(Mapping[] all, ulong address, int size)
    {
        Mapping? owner = Owner(all, address, size, out bool split);
        if (!split) return owner is null ? AllOnes(size) : owner.Device.Read(owner.Bar, address - owner.First, size) & AllOnes(size);
        ulong value = 0;
        for (int i = 0; i < size; i++) value |= Read(all, address + (ulong)i, 1) << (8 * i);
        return value;
    }

    private static void Write(Mapping[] all, ulong address, int size, ulong value)
    {
        Mapping? owner = Owner(all, address, size, out bool split);
        value &= AllOnes(size);
        if (!split) owner?.Device.Write(owner.Bar, address - owner.First, size, value);
        else for (int i = 0; i < size; i++) Write(all, address + (ulong)i, 1, value >> (8 * i));
    }

    /// <summary>Decodes the address register: bit 31 enable, 23:16 bus, 15:8 slot and function, 7:2 register. The low port bits select the byte.</summary>
    private bool ConfigTarget(ushort port, int size, out ushort bdf, out int offset)
    {
        int lane = port - ConfigDataPort;
        bdf = (ushort)(_configReg >> 8);
        offset = (int)(_configReg & 0xfc) | lane;
        return (_configReg & ConfigEnable) != 0 && lane + size <= 4;
    }

    private PciDevice? Target(ushort bdf, int offset, int size) =>
        bdf >> 8 == 0 && offset >= 0 && offset + size <= PciConfigSpace.LegacyBytes ? _functions[(byte)bdf] : null;
}
