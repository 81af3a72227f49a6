using System.Buffers.Binary;

namespace Vmm.Core.Pci;

/// <summary>
/// The configuration space of one function: values, and for each bit whether the guest may write it (wmask), whether the guest clears it by writing
/// 1 (w1cmask), and whether both sides of a migration must agree on it (cmask). Little-endian. BQL: held for every call.
/// </summary>
public sealed class PciConfigSpace
{
    /// <summary>Size of a conventional function's space.</summary>
    public const int LegacyBytes = 256;

    /// <summary>Size of an express function's space.</summary>
    public const int ExpressBytes = 4096;

    private readonly byte[] _bytes, _wmask, _w1cmask, _cmask;

    /// <summary>Makes a space of zeros with QEMU's default masks for a type 0 header.</summary>
    /// <param name="isExpress">True for 4096 bytes, false for 256.</param>
    public PciConfigSpace(bool isExpress)
    {
        int size = isExpress ? ExpressBytes : LegacyBytes;
        (_bytes, _wmask, _w1cmask, _cmask) = (new byte[size], new byte[size], new byte[size], new byte[size]);

        BinaryPrimitives.WriteUInt32LittleEndian(_cmask, 0xffffffff);
        _cmask[PciRegisters.Status] = (byte)PciRegisters.StatusCapabilityList;
        _cmask.AsSpan(PciRegisters.RevisionId, 4).Fill(0xff);
        _cmask[PciRegisters.HeaderType] = 0xff;
        _cmask[PciRegisters.CapabilityList] = 0xff;

        _wmask[PciRegisters.CacheLineSize] = 0xff;
        _wmask[PciRegisters.InterruptLine] = 0xff;
        BinaryPrimitives.WriteUInt16LittleEndian(_wmask.AsSpan(PciRegisters.Command),
            (ushort)(PciCommand.Io | PciCommand.Memory | PciCommand.Master | PciCommand.SystemError | PciCommand.IntxDisable));
        _wmask.AsSpan(PciRegisters.HeaderBytes).Fill(0xff);
        BinaryPrimitives.WriteUInt16LittleEndian(_w1cmask.AsSpan(PciRegisters.Status), PciRegisters.StatusWriteOneToClear);
    }

    /// <summary>Size of the space: 256 or 4096.</summary>
    public int SizeBytes => _bytes.Length;

    /// <summary>True if the space has the extended part of PCI Express.</summary>
    public bool IsExpress => _bytes.Length == ExpressBytes;

    /// <summary>The values.</summary>
    public Span<byte> Bytes => _bytes;

    /// <summary>Bits that the guest may write.</summary>
    public Span<byte> WMask => _wmask;

    /// <summary>Bits that the guest clears by writing 1; none of them is in <see cref="WMask"/>.</summary>
    public Span<byte> W1cMask => _w1cmask;

    /// <summary>Bits on which source and destination must agree, unless the guest can change them.</summary>
    public Span<byte> CMask => _cmask;

    /// <summary>The command register.</summary>
    public PciCommand Command => (PciCommand)GetUInt16(PciRegisters.Command);

    /// <summary>Handles a guest's read.</summary>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <returns>The value; bytes after the end read as zero.</returns>
    public uint Read(int offset, int size)
    {
        uint value = 0;
        for (int i = 0; i < size && offset + i < _bytes.Length; i++) value |= (uint)_bytes[offset + i] << (8 * i);
        return value;
    }

    /// <summary>Handles a guest's write: writable bits change, a 1 clears write-one-to-clear bits, all other bits stay.</summary>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public void Write(int offset, int size, uint value)
    {
        for (int i = 0; i < size && offset + i < _bytes.Length; i++, value >>= 8)
        {
            int at = offset + i;
            byte written = (byte)value;
            _bytes[at] = (byte)((_bytes[at] & ~_wmask[at]) | (written & _wmask[at]));
            _bytes[at] &= (byte)~(written & _w1cmask[at]);
        }
    }

    /// <summary>Reads a u16.</summary>
    public ushort GetUInt16(int offset) => BinaryPrimitives.ReadUInt16LittleEndian(_bytes.AsSpan(offset));

    /// <summary>Reads a u32.</summary>
    public uint GetUInt32(int offset) => BinaryPrimitives.ReadUInt32LittleEndian(_bytes.AsSpan(offset));

    /// <summary>Reads a u64.</summary>
    public ulong GetUInt64(int offset) => BinaryPrimitives.ReadUInt64LittleEndian(_bytes.AsSpan(offset));

    /// <summary>Sets a u16; ignores the masks.</summary>
    public void SetUInt16(int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(_bytes.AsSpan(offset), value);

    /// <summary>Sets a u32; ignores the masks.</summary>
    public void SetUInt32(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(_bytes.AsSpan(offset), value);

    /// <summary>Sets a u64; ignores the masks.</summary>
    public void SetUInt64(int offset, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(_bytes.AsSpan(offset), value);

    /// <summary>Walks the standard capability chain. A pointer out of bounds, or to a capability seen before, ends the walk.</summary>
    /// <param name="isBroken">True if the chain did not end with a zero.</param>
    /// <returns>Capabilities in chain order.</returns>
    public IReadOnlyList<(byte Id, int Offset)> Capabilities(out bool isBroken)
    {
        isBroken = false;
        var found = new List<(byte Id, int Offset)>();
        if ((_bytes[PciRegisters.Status] & PciRegisters.StatusCapabilityList) == 0) return found;
        ulong seen = 0;
        for (int at = _bytes[PciRegisters.CapabilityList] & ~3; at != 0; at = _bytes[at + 1] & ~3)
        {
            isBroken = at < PciRegisters.HeaderBytes || (seen >> (at / 4) & 1) != 0;
            if (isBroken) break;
            seen |= 1UL << (at / 4);
            found.Add((_bytes[at], at));
        }
        return found;
    }

    /// <summary>Finds a capability.</summary>
    /// <returns>Offset of the first capability with this id; 0 if there is none.</returns>
    public int FindCapability(byte id)
    {
        foreach ((byte Id, int Offset) c in Capabilities(out _))
            if (c.Id == id) return c.Offset;
        return 0;
    }

    /// <summary>
    /// Adds a capability at the head of the chain. Until its owner changes the masks, the guest cannot write it and both sides of a migration must agree
    /// on it (QEMU: <c>pci_add_capability</c>).
    /// </summary>
    /// <param name="id">Capability id; <see cref="PciCapabilityId"/>.</param>
    /// <param name="offset">Multiple of 4 from 0x40 on.</param>
    /// <param name="sizeBytes">Length of the capability, at least 2; it ends at 0x100 or before.</param>
    /// <exception cref="ArgumentOutOfRangeException">The capability cannot be there.</exception>
    public void AddCapability(byte id, int offset, int sizeBytes)
    {
        if (offset < PciRegisters.HeaderBytes || (offset & 3) != 0 || sizeBytes < 2 || offset + sizeBytes > LegacyBytes)
            throw new ArgumentOutOfRangeException(nameof(offset), $"capability 0x{id:x2} cannot be at 0x{offset:x2}+0x{sizeBytes:x}");
        _bytes[offset] = id;
        _bytes[offset + 1] = _bytes[PciRegisters.CapabilityList];
        _bytes[PciRegisters.CapabilityList] = (byte)offset;
        _bytes[PciRegisters.Status] |= (byte)PciRegisters.StatusCapabilityList;
        _wmask.AsSpan(offset, sizeBytes).Clear();
        _w1cmask.AsSpan(offset, sizeBytes).Clear();
        _cmask.AsSpan(offset, sizeBytes).Fill(0xff);
    }

    /// <summary>Compares an incoming space in every bit that both sides must agree on and that no guest can change.</summary>
    /// <param name="incoming">Must have the size of this space.</param>
    /// <returns>Offset of the first byte that differs; -1 if none does.</returns>
    public int FindMismatch(ReadOnlySpan<byte> incoming)
    {
        for (int i = 0; i < _bytes.Length; i++)
            if (((incoming[i] ^ _bytes[i]) & CheckedBits(i)) != 0) return i;
        return -1;
    }

    /// <summary>Returns the bits of one byte that both sides of a migration must agree on.</summary>
    public byte CheckedBits(int offset) => (byte)(_cmask[offset] & ~_wmask[offset] & ~_w1cmask[offset]);
}
