using Vmm.Core.Pci;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// Config space of a hosted PCI function (vfio-user 5): the core's space with BARs to be sized, read-only fields, and a ROM register that
/// is not there. Writes on the session's thread; the flags may be read from any.
/// </summary>
public sealed class VfioUserPciConfig
{
    /// <summary>Bytes of conventional config space.</summary>
    public const int Length = PciConfigSpace.LegacyBytes;

    private const ushort MsixControlMask = 0xc000, MsixEnable = 0x8000;

    private readonly PciConfigSpace _space = new(isExpress: false);
    private readonly DmaMap _dma;
    private byte[] _powerOn = [];
    private int _msixAt;

    /// <summary>Makes the header.</summary>
    /// <param name="dma">Follows the bus master bit.</param>
    /// <param name="vendor">Vendor id, the subsystem's too.</param>
    /// <param name="device">Device id, the subsystem's too.</param>
    /// <param name="classCode">Base class, subclass, interface in 24 bits.</param>
    /// <param name="hasIntx">Interrupt pin A.</param>
    public VfioUserPciConfig(DmaMap dma, ushort vendor, ushort device, uint classCode, bool hasIntx)
    {
        _dma = dma;
        _space.SetUInt16(PciRegisters.VendorId, vendor);
        _space.SetUInt16(PciRegisters.DeviceId, device);
        _space.SetUInt16(PciRegisters.SubsystemVendorId, vendor);
        _space.SetUInt16(PciRegisters.SubsystemId, device);
        _space.Bytes[PciRegisters.ClassProg] = (byte)classCode;
        _space.SetUInt16(PciRegisters.ClassDevice, (ushort)(classCode >> 8));
        _space.Bytes[PciRegisters.InterruptPin] = hasIntx ? (byte)1 : (byte)0;
        // What no capability claims does not exist.
        _space.WMask[PciRegisters.HeaderBytes..].Clear();
        SavePowerOn();
    }

    /// <summary>The level of INTx, for the status register: drivers that share a line look there. Any thread.</summary>
    public Func<bool>? IntxLevel { get; set; }

    /// <summary>Whether MSI-X is on: interrupts are vectors, not the line.</summary>
    public bool IsMsixEnabled => _msixAt != 0 && (_space.GetUInt16(_msixAt + 2) & MsixEnable) != 0;

    /// <summary>Whether the guest has switched INTx off.</summary>
    public bool IsIntxDisabled => (_space.Command & PciCommand.IntxDisable) != 0;

    /// <summary>Sets the ids of the subsystem, which are otherwise those of the function.</summary>
    /// <param name="vendor">Vendor id.</param>
    /// <param name="device">Device id.</param>
    public void SetSubsystem(ushort vendor, ushort device)
    {
        _space.SetUInt16(PciRegisters.SubsystemVendorId, vendor);
        _space.SetUInt16(PciRegisters.SubsystemId, device);
        SavePowerOn();
    }

    /// <summary>Sets the revision.</summary>
    /// <param name="revision">The revision.</param>
    public void SetRevision(byte revision)
    {
        _space.Bytes[PciRegisters.RevisionId] = revision;
        SavePowerOn();
    }

    /// <summary>Adds a 32-bit memory BAR.</summary>
    /// <param name="index">0 to 5.</param>
    /// <param name="sizeBytes">A power of two, at least 16.</param>
    public void AddBar(int index, uint sizeBytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)index, 5u, nameof(index));
        if (sizeBytes < 16 || !uint.IsPow2(sizeBytes)) throw new ArgumentOutOfRangeException(nameof(sizeBytes));
        LittleEndian.U32(_space.WMask, PciRegisters.BaseAddress0 + (4 * index), ~(sizeBytes - 1));
    }

    /// <summary>Adds an I/O BAR.</summary>
    /// <param name="index">0 to 5.</param>
    /// <param name="sizeBytes">4 to 64 KiB; decodes as the next power of two. A PC guest takes 256 at most.</param>
    public void AddIoBar(int index, uint sizeBytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)index, 5u, nameof(index));
        if (sizeBytes is < 4 or > 0x10000) throw new ArgumentOutOfRangeException(nameof(sizeBytes));
        int offset = PciRegisters.BaseAddress0 + (4 * index);
        LittleEndian.U32(_space.WMask, offset, ~(System.Numerics.BitOperations.RoundUpToPowerOf2(sizeBytes) - 1) & ~3u);
        _space.SetUInt32(offset, 1);
        SavePowerOn();
    }

    /// <summary>Adds the MSI-X capability.</summary>
    /// <param name="offset">Where in config space.</param>
    /// <param name="layout">Where table and pending bits are.</param>
    public void AddMsix(int offset, MsixLayout layout)
    {
        _space.AddCapability(PciCapabilityId.Msix, offset, MsixTable.CapabilityBytes);
        _space.SetUInt16(offset + 2, (ushort)(layout.Vectors - 1));
        _space.SetUInt32(offset + 4, layout.TableOffset | (uint)layout.TableBar);
        _space.SetUInt32(offset + 8, layout.PbaOffset | (uint)layout.PbaBar);
        _space.WMask[offset + 3] = MsixControlMask >> 8;
        _msixAt = offset;
        SavePowerOn();
    }

    /// <summary>A read of region 7.</summary>
    /// <param name="offset">Inside.</param>
    /// <param name="destination">Inside.</param>
    public void Read(ulong offset, Span<byte> destination)
    {
        _space.Bytes.Slice((int)offset, destination.Length).CopyTo(destination);
        if (offset <= PciRegisters.Status && offset + (uint)destination.Length > PciRegisters.Status && IntxLevel?.Invoke() == true)
            destination[PciRegisters.Status - (int)offset] |= (byte)PciRegisters.StatusInterrupt;
    }

    /// <summary>A write of region 7; read-only bits keep their value.</summary>
    /// <param name="offset">Inside.</param>
    /// <param name="source">Inside.</param>
    public void Write(ulong offset, ReadOnlySpan<byte> source)
    {
        for (int i = 0; i < source.Length; i++) _space.Write((int)offset + i, 1, source[i]);
        Apply();
    }

    /// <summary>Power-on values.</summary>
    public void Reset()
    {
        _powerOn.CopyTo(_space.Bytes);
        Apply();
    }

    /// <summary>The bytes, for the device's state.</summary>
    /// <returns>A copy.</returns>
    public byte[] SaveState() => _space.Bytes.ToArray();

    /// <summary>Takes a saved config space of the same function; read-only bits stay ours.</summary>
    /// <param name="state">The bytes.</param>
    /// <returns>False when bits that must agree differ: another device.</returns>
    public bool LoadState(ReadOnlySpan<byte> state)
    {
        if (state.Length != Length || _space.FindMismatch(state) >= 0) return false;
        for (int i = 0; i < Length; i++) _space.Bytes[i] = (byte)((_space.Bytes[i] & ~_space.WMask[i]) | (state[i] & _space.WMask[i]));
        Apply();
        return true;
    }

    private void Apply() => _dma.IsBusMaster = (_space.Command & PciCommand.Master) != 0;

    private void SavePowerOn() => _powerOn = SaveState();
}
