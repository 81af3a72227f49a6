using System.Buffers.Binary;
using Vmm.Devices.Vfio.Io;

namespace Vmm.Devices.Vfio.User;

/// <summary>
/// Config space of a hosted PCI function (spec vfio-user 5): 256 bytes with a write mask, so that sizing, read-only fields and a ROM that is not there come
/// out by themselves. Not thread-safe: the session's thread; the flags may be read from any.
/// </summary>
public sealed class VfioUserPciConfig
{
    /// <summary>Bytes of conventional config space.</summary>
    public const int Length = 256;

    private const int CommandAt = 4, StatusAt = 6, BarAt = 0x10, CapabilityAt = 0x34, LineAt = 0x3c, PinAt = 0x3d, FirstCapability = 0x40;
    /// <summary>I/O, memory, bus master, parity, SERR, INTx disable.</summary>
    private const ushort CommandMask = 0x0547;
    private const ushort BusMaster = 4, IntxDisable = 0x400, StatusCapabilities = 0x10, MsixControlMask = 0xc000, MsixEnable = 0x8000;

    private readonly byte[] _bytes = new byte[Length], _mask = new byte[Length], _powerOn = new byte[Length];
    private readonly DmaMap _dma;
    private int _nextCapability = FirstCapability, _lastPointer = CapabilityAt, _msixAt;

    /// <summary>Makes the header.</summary>
    /// <param name="dma">Follows the bus master bit.</param>
    /// <param name="vendor">Vendor id.</param>
    /// <param name="device">Device id.</param>
    /// <param name="classCode">Base class, subclass, interface in 24 bits.</param>
    /// <param name="hasIntx">Interrupt pin A.</param>
    public VfioUserPciConfig(DmaMap dma, ushort vendor, ushort device, uint classCode, bool hasIntx)
    {
        _dma = dma;
        Set16(0, vendor);
        Set16(2, device);
        _bytes[9] = (byte)classCode;
        Set16(10, (ushort)(classCode >> 8));
        Set16(0x2c, vendor);
        Set16(0x2e, device);
        _bytes[PinAt] = hasIntx ? (byte)1 : (byte)0;
        BinaryPrimitives.WriteUInt16LittleEndian(_mask.AsSpan(CommandAt), CommandMask);
        _mask[12] = _mask[LineAt] = 0xff;
    }

    /// <summary>Whether MSI-X is on: interrupts are vectors, not the line.</summary>
    public bool IsMsixEnabled => _msixAt != 0 && (Get16(_msixAt + 2) & MsixEnable) != 0;

    /// <summary>Whether the guest has switched INTx off.</summary>
    public bool IsIntxDisabled => (Get16(CommandAt) & IntxDisable) != 0;

    /// <summary>Adds a 32-bit memory BAR.</summary>
    /// <param name="index">0 to 5.</param>
    /// <param name="sizeBytes">A power of two, at least 16.</param>
    public void AddBar(int index, uint sizeBytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)index, 5u, nameof(index));
        if (sizeBytes < 16 || !uint.IsPow2(sizeBytes)) throw new ArgumentOutOfRangeException(nameof(sizeBytes));
        BinaryPrimitives.WriteUInt32LittleEndian(_mask.AsSpan(BarAt + (4 * index)), ~(sizeBytes - 1));
        SavePowerOn();
    }

    /// <summary>Adds the MSI-X capability.</summary>
    /// <param name="vectors">1 to 2048.</param>
    /// <param name="bar">BAR of table and pending bits.</param>
    /// <param name="tableOffset">Multiple of 8.</param>
    /// <param name="pendingOffset">Multiple of 8.</param>
    public void AddMsix(int vectors, int bar, uint tableOffset, uint pendingOffset)
    {
        _msixAt = AddCapability(0x11, 12);
        Set16(_msixAt + 2, (ushort)(vectors - 1));
        BinaryPrimitives.WriteUInt16LittleEndian(_mask.AsSpan(_msixAt + 2), MsixControlMask);
        BinaryPrimitives.WriteUInt32LittleEndian(_bytes.AsSpan(_msixAt + 4), tableOffset | (uint)bar);
        BinaryPrimitives.WriteUInt32LittleEndian(_bytes.AsSpan(_msixAt + 8), pendingOffset | (uint)bar);
        SavePowerOn();
    }

    /// <summary>A read of region 7.</summary>
    /// <param name="offset">Inside.</param>
    /// <param name="destination">Inside.</param>
    public void Read(ulong offset, Span<byte> destination) => _bytes.AsSpan((int)offset, destination.Length).CopyTo(destination);

    /// <summary>A write of region 7; read-only bits keep their value.</summary>
    /// <param name="offset">Inside.</param>
    /// <param name="source">Inside.</param>
    public void Write(ulong offset, ReadOnlySpan<byte> source)
    {
        for (int i = 0; i < source.Length; i++)
        {
            int at = (int)offset + i;
            _bytes[at] = (byte)((_bytes[at] & ~_mask[at]) | (source[i] & _mask[at]));
        }
        Apply();
    }

    /// <summary>Power-on values.</summary>
    public void Reset() => Load(_powerOn);

    /// <summary>The bytes, for the device's state.</summary>
    /// <returns>A copy.</returns>
    public byte[] SaveState() => [.. _bytes];

    /// <summary>Takes a saved config space of the same function.</summary>
    /// <param name="state">The bytes.</param>
    /// <returns>False when read-only bits differ: another device.</returns>
    public bool LoadState(ReadOnlySpan<byte> state)
    {
        if (state.Length != Length) return false;
        for (int i = 0; i < Length; i++)
            if (((state[i] ^ _powerOn[i]) & ~_mask[i]) != 0) return false;
        Load(state);
        return true;
    }

    private int AddCapability(byte id, int sizeBytes)
    {
        int at = _nextCapability;
        _bytes[_lastPointer] = (byte)at;
        _bytes[at] = id;
        _lastPointer = at + 1;
        _nextCapability = (at + sizeBytes + 3) & ~3;
        _bytes[StatusAt] |= (byte)StatusCapabilities;
        return at;
    }

    private void Load(ReadOnlySpan<byte> bytes)
    {
        bytes.CopyTo(_bytes);
        Apply();
    }

    private void Apply() => _dma.IsBusMaster = (Get16(CommandAt) & BusMaster) != 0;

    private void SavePowerOn() => _bytes.CopyTo(_powerOn, 0);

    private ushort Get16(int at) => BinaryPrimitives.ReadUInt16LittleEndian(_bytes.AsSpan(at));

    private void Set16(int at, ushort value)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(_bytes.AsSpan(at), value);
        SavePowerOn();
    }
}
