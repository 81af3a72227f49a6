namespace Vmm.Core.Pci;

// Passes a guest's access to a BAR to the MSI-X structures or to the device.
public abstract partial class PciDevice
{
    private enum Target
    {
        Device,
        Table,
        Pba,
        Split,
    }

    /// <summary>
    /// Reads a BAR as a guest does: the core answers for the MSI-X table and PBA, the device for the rest. For a server that offers the function to
    /// another VMM's guest. BQL: not needed.
    /// </summary>
    /// <param name="bar">BAR, 0 to 5.</param>
    /// <param name="offset">Offset in the BAR; the access ends inside it.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <returns>The value, little-endian.</returns>
    public ulong Read(int bar, ulong offset, int size)
    {
        switch (Find(bar, offset, size, out int at))
        {
            case Target.Table:
                using (Host.Bql.Acquire()) return Msix!.ReadTable(at, size);
            case Target.Pba:
                using (Host.Bql.Acquire())
                    if (EmulatesPba) return Msix!.ReadPba(at, size);
                return DeviceRead(bar, offset, size);
            case Target.Split:
                ulong value = 0;
                for (int i = 0; i < size; i++) value |= Read(bar, offset + (ulong)i, 1) << (8 * i);
                return value;
            default:
                return DeviceRead(bar, offset, size);
        }
    }

    /// <summary>Writes a BAR as a guest does; see <see cref="Read"/>. BQL: not needed.</summary>
    /// <param name="bar">BAR, 0 to 5.</param>
    /// <param name="offset">Offset in the BAR; the access ends inside it.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void Write(int bar, ulong offset, int size, ulong value)
    {
        switch (Find(bar, offset, size, out int at))
        {
            case Target.Table:
                using (Host.Bql.Acquire()) Msix!.WriteTable(at, size, value);
                return;
            case Target.Pba:
                return;
            case Target.Split:
                for (int i = 0; i < size; i++) Write(bar, offset + (ulong)i, 1, value >> (8 * i));
                return;
            default:
                if (!BarsNeedBql) BarWrite(bar, offset, size, value);
                else using (Host.Bql.Acquire()) BarWrite(bar, offset, size, value);
                return;
        }
    }

    private ulong DeviceRead(int bar, ulong offset, int size)
    {
        if (!BarsNeedBql) return BarRead(bar, offset, size);
        using (Host.Bql.Acquire()) return BarRead(bar, offset, size);
    }

    private Target Find(int bar, ulong offset, int size, out int at)
    {
        at = 0;
        if (Msix is null) return Target.Device;
        MsixLayout layout = Msix.Layout;
        Target table = bar == layout.TableBar ? In(layout.TableOffset, layout.TableBytes, Target.Table, ref at) : Target.Device;
        if (table != Target.Device) return table;
        return bar == layout.PbaBar ? In(layout.PbaOffset, layout.PbaBytes, Target.Pba, ref at) : Target.Device;

        Target In(ulong start, int length, Target target, ref int at)
        {
            ulong end = start + (ulong)length, last = offset + (ulong)size;
            if (last <= start || offset >= end) return Target.Device;
            if (offset < start || last > end) return Target.Split;
            at = (int)(offset - start);
            return target;
        }
    }
}
