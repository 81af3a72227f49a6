using Vmm.Core.Pci;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// Config space of a hosted PCI function (vfio-user 5): the core's space with BARs that can be sized, read-only fields, and no ROM
/// register. Writes come on the session's thread; any thread may read the flags.
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
    /// <param name="dma">Map whose <see cref="DmaMap.IsBusMaster"/> follows the command register.</param>
    /// <param name="vendor">Vendor id, also of the subsystem.</param>
    /// <param name="device">Device id, also of the subsystem.</param>
    /// <param name="classCode">Base class, subclass, interface in 24 bits.</param>
    /// <param name="hasIntx">The function has interrupt pin A.</param>
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
        // Registers outside the header and the capabilities do not exist.
        _space.WMask[PciRegisters.HeaderBytes..].Clear();
        SavePowerOn();
    }

    /// <summary>Level of INTx as the status register shows it, which drivers of a shared line read. Any thread.</summary>
    public Func<bool>? IntxLevel { get; set; }

    /// <summary>Whether MSI-X is on, so that interrupts are vectors and not the line.</summary>
    public bool IsMsixEnabled => _msixAt != 0 && (_space.GetUInt16(_msixAt + 2) & MsixEnable) != 0;

    /// <summary>Whether the guest has switched INTx off.</summary>
    public bool IsIntxDisabled => (_space.Command & PciCommand.IntxDisable) != 0;

    /// <summary>Sets the ids of the subsystem; without a call they equal those of the function.</summary>
    /// <param name="vendor">Vendor id of the subsystem.</param>
    /// <param name="device">Device id of the subsystem.</param>
    public void SetSubsystem(ushort vendor, ushort device)
    {
        _space.SetUInt16(PciRegisters.SubsystemVendorId, vendor);
        _space.SetUInt16(PciRegisters.SubsystemId, device);
        SavePowerOn();
    }

    /// <summary>Sets the revision.</summary>
    /// <param name="revision">Value of the revision register.</param>
    public void SetRevision(byte revision)
    {
        _space.Bytes[PciRegisters.RevisionId] = revision;
        SavePowerOn();
    }

    /// <summary>Adds a 32-bit memory BAR.</summary>
    /// <param name="index">BAR number, 0 to 5.</param>
    /// <param name="sizeBytes">Size in bytes, a power of two from 16.</param>
    /// <exception cref="ArgumentException">Another number or size.</exception>
    public void AddBar(int index, uint sizeBytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)index, 5u, nameof(index));
        if (sizeBytes < 16 || !uint.IsPow2(sizeBytes)) throw new ArgumentOutOfRangeException(nameof(sizeBytes));
        LittleEndian.U32(_space.WMask, PciRegisters.BaseAddress0 + (4 * index), ~(sizeBytes - 1));
    }

    /// <summary>Adds an I/O BAR.</summary>
    /// <param name="index">BAR number, 0 to 5.</param>
    /// <param name="sizeBytes">Size in bytes, 4 to 64 KiB; decodes as the next power of two. A PC guest accepts 256 at most.</param>
    /// <exception cref="ArgumentException">Another number or size.</exception>
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
    /// <param name="offset">Offset of the capability in config space.</param>
    /// <param name="layout">BARs and offsets of table and pending bits.</param>
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

    /// <summary>Reads from config space, region 7.</summary>
    /// <param name="offset">First byte; the access must lie inside the space.</param>
    /// <param name="destination">Buffer to fill.</param>
    public void Read(ulong offset, Span<byte> destination)
    {
        _space.Bytes.Slice((int)offset, destination.Length).CopyTo(destination);
        if (offset <= PciRegisters.Status && offset + (uint)destination.Length > PciRegisters.Status && IntxLevel?.Invoke() == true)
            destination[PciRegisters.Status - (int)offset] |= (byte)PciRegisters.StatusInterrupt;
    }

    /// <summary>Writes to config space, region 7; read-only bits keep their values.</summary>
    /// <param name="offset">First byte; the access must lie inside the space.</param>
    /// <param name="source">Bytes to write.</param>
    public void Write(ulong offset, ReadOnlySpan<byte> source)
    {
        for (int i = 0; i < source.Length; i++) _space.Write((int)offset + i, 1, source[i]);
        Apply();
    }

    /// <summary>Sets all registers to their power-on values.</summary>
    public void Reset()
    {
        _powerOn.CopyTo(_space.Bytes);
        Apply();
    }

    /// <summary>All bytes of the space, for the device's state.</summary>
    /// <returns>A new array.</returns>
    public byte[] SaveState() => _space.Bytes.ToArray();

    /// <summary>Loads a saved config space of the same function; read-only bits keep their present values.</summary>
    /// <param name="state">Bytes that were saved.</param>
    /// <returns>False when bits that must agree differ, so that the state is another device's.</returns>
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
