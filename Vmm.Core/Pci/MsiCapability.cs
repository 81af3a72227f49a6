using System.Numerics;

namespace Vmm.Core.Pci;

/// <summary>
/// An emulated MSI capability in a function's configuration space: all state is in there, so it migrates with it (QEMU: <c>msi.c</c>).
/// BQL: held for every call.
/// </summary>
public sealed class MsiCapability
{
    private const int Flags = 2, AddressLow = 4, AddressHigh = 8;
    private const ushort Enable = 1, QSize = 0x70, SixtyFour = 0x80, MaskBit = 0x100;

    private readonly PciConfigSpace _config;
    private readonly Action<MsiMessage> _send;

    /// <summary>Adds the capability, disabled, at the head of the chain.</summary>
    /// <param name="config">The function's space.</param>
    /// <param name="offset">Where.</param>
    /// <param name="vectors">1, 2, 4, 8, 16 or 32.</param>
    /// <param name="is64Bit">Takes 64-bit addresses.</param>
    /// <param name="isMaskable">Has a mask bit a vector.</param>
    /// <param name="send">Sends a message.</param>
    public MsiCapability(PciConfigSpace config, int offset, int vectors, bool is64Bit, bool isMaskable, Action<MsiMessage> send)
    {
        ArgumentNullException.ThrowIfNull(config);
        if (vectors is < 1 or > 32 || !BitOperations.IsPow2(vectors)) throw new ArgumentOutOfRangeException(nameof(vectors), $"{vectors} MSI vectors");
        (_config, _send, Offset, MaxVectors, Is64Bit, IsMaskable) = (config, send, offset, vectors, is64Bit, isMaskable);
        SizeBytes = 10 + (is64Bit ? 4 : 0) + (isMaskable ? 10 : 0);
        config.AddCapability(PciCapabilityId.Msi, offset, SizeBytes);
        config.Bytes.Slice(offset + Flags, SizeBytes - Flags).Clear();
        config.SetUInt16(offset + Flags, (ushort)(BitOperations.Log2((uint)vectors) << 1 | (is64Bit ? SixtyFour : 0) | (isMaskable ? MaskBit : 0)));
        Writable(Flags, 2, QSize | Enable);
        Writable(AddressLow, 4, 0xfffffffc);
        if (is64Bit) Writable(AddressHigh, 4, 0xffffffff);
        Writable(Data, 2, 0xffff);
        if (!isMaskable) return;
        Writable(Mask, 4, uint.MaxValue >> (32 - vectors));
        // Pending bits come and go with interrupts; a check would refuse machines that only differ in timing.
        config.CMask.Slice(offset + Pending, 4).Clear();
    }

    /// <summary>Where it is.</summary>
    public int Offset { get; }

    /// <summary>Its length, which depends on what it can.</summary>
    public int SizeBytes { get; }

    /// <summary>Vectors that the function has.</summary>
    public int MaxVectors { get; }

    /// <summary>Takes 64-bit addresses.</summary>
    public bool Is64Bit { get; }

    /// <summary>Has a mask bit a vector.</summary>
    public bool IsMaskable { get; }

    /// <summary>Takes raised vectors in place of messages: whoever set it has the messages and masks.</summary>
    internal Action<int>? Redirect { get; set; }

    /// <summary>Whether the guest enabled it.</summary>
    public bool IsEnabled => (Control & Enable) != 0;

    /// <summary>The control word as the guest sees it.</summary>
    public ushort Control => _config.GetUInt16(Offset + Flags);

    /// <summary>Vectors that the guest allocated (QEMU: <c>msi_nr_vectors_allocated</c>), never more than there are.</summary>
    public int Vectors => Math.Min(1 << ((Control & QSize) >> 4), MaxVectors);

    private int Data => Is64Bit ? 12 : 8;

    private int Mask => Is64Bit ? 16 : 12;

    private int Pending => Mask + 4;

    /// <summary>Whether the guest masked a vector.</summary>
    /// <param name="vector">The vector.</param>
    /// <returns>Its mask bit.</returns>
    public bool IsMasked(int vector) => IsMaskable && (_config.GetUInt32(Offset + Mask) >> vector & 1) != 0;

    /// <summary>The message of a vector.</summary>
    /// <param name="vector">Below <see cref="Vectors"/>.</param>
    /// <returns>The message.</returns>
    public MsiMessage Message(int vector)
    {
        ulong address = Is64Bit ? _config.GetUInt64(Offset + AddressLow) : _config.GetUInt32(Offset + AddressLow);
        uint data = _config.GetUInt16(Offset + Data);
        return new MsiMessage(address, Vectors > 1 ? (data & ~((uint)Vectors - 1)) | (uint)vector : data);
    }

    /// <summary>Raises a vector: sends its message, or notes it as pending while it is masked. Nothing while the capability is disabled.</summary>
    /// <param name="vector">One that the guest did not allocate is ignored.</param>
    public void Notify(int vector)
    {
        if (!IsEnabled || (uint)vector >= (uint)Vectors) return;
        if (Redirect is { } redirect) redirect(vector);
        else if (IsMasked(vector)) _config.SetUInt32(Offset + Pending, _config.GetUInt32(Offset + Pending) | 1U << vector);
        else _send(Message(vector));
    }

    /// <summary>After a guest's write: clamps the vector count and sends what was pending and is no longer masked.</summary>
    /// <param name="offset">Start of the write.</param>
    /// <param name="size">Its length.</param>
    /// <returns>True if MSI is enabled and the write touched it: INTx must then be off.</returns>
    public bool ConfigWritten(int offset, int size)
    {
        if (offset + size <= Offset || offset >= Offset + SizeBytes || !IsEnabled) return false;
        int log = BitOperations.Log2((uint)MaxVectors);
        if ((Control & QSize) >> 4 > log) _config.SetUInt16(Offset + Flags, (ushort)((Control & ~QSize) | log << 4));
        if (!IsMaskable) return true;
        uint pending = _config.GetUInt32(Offset + Pending) & uint.MaxValue >> (32 - Vectors);
        uint ready = pending & ~_config.GetUInt32(Offset + Mask);
        _config.SetUInt32(Offset + Pending, pending & ~ready);
        for (; ready != 0; ready &= ready - 1) _send(Message(BitOperations.TrailingZeroCount(ready)));
        return true;
    }

    /// <summary>Power-on state: disabled, everything zero.</summary>
    public void Reset()
    {
        ushort control = (ushort)(Control & ~(QSize | Enable));
        _config.Bytes.Slice(Offset + Flags, SizeBytes - Flags).Clear();
        _config.SetUInt16(Offset + Flags, control);
    }

    private void Writable(int at, int size, uint mask)
    {
        for (int i = 0; i < size; i++) _config.WMask[Offset + at + i] = (byte)(mask >> (8 * i));
    }
}
