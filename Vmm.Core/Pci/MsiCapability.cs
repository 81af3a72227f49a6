using System.Numerics;

namespace Vmm.Core.Pci;

/// <summary>
/// An emulated MSI capability. Its whole state is in the function's configuration space and migrates with it (QEMU: <c>msi.c</c>).
/// BQL: held for every call.
/// </summary>
public sealed class MsiCapability
{
    private const int Flags = 2, AddressLow = 4, AddressHigh = 8;
    private const ushort Enable = 1, QSize = 0x70, SixtyFour = 0x80, MaskBit = 0x100;

    private readonly PciConfigSpace _config;
    private readonly Action<MsiMessage> _send;

    /// <summary>Adds the capability, disabled, at the head of the chain.</summary>
    /// <param name="config">Configuration space of the function.</param>
    /// <param name="offset">Offset of the capability in it.</param>
    /// <param name="vectors">1, 2, 4, 8, 16 or 32.</param>
    /// <param name="is64Bit">True if the capability takes 64-bit addresses.</param>
    /// <param name="isMaskable">True if each vector has a mask bit.</param>
    /// <param name="send">Called with each message to send.</param>
    /// <exception cref="ArgumentOutOfRangeException">Another number of vectors, or the capability does not fit at the offset.</exception>
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
        // Pending bits change with every interrupt; a comparison would refuse a peer that differs only in timing.
        config.CMask.Slice(offset + Pending, 4).Clear();
    }

    /// <summary>Offset of the capability in configuration space.</summary>
    public int Offset { get; }

    /// <summary>Length of the capability; 64-bit addresses and mask bits make it longer.</summary>
    public int SizeBytes { get; }

    /// <summary>Number of vectors of the function.</summary>
    public int MaxVectors { get; }

    /// <summary>True if the capability takes 64-bit addresses.</summary>
    public bool Is64Bit { get; }

    /// <summary>True if each vector has a mask bit.</summary>
    public bool IsMaskable { get; }

    /// <summary>If set, receives raised vectors instead of <c>send</c>; the owner of the delegate then has the messages and the mask bits.</summary>
    internal Action<int>? Redirect { get; set; }

    /// <summary>True if the guest has enabled MSI.</summary>
    public bool IsEnabled => (Control & Enable) != 0;

    /// <summary>The control word as the guest sees it.</summary>
    public ushort Control => _config.GetUInt16(Offset + Flags);

    /// <summary>Number of vectors that the guest allocated (QEMU: <c>msi_nr_vectors_allocated</c>), at most <see cref="MaxVectors"/>.</summary>
    public int Vectors => Math.Min(1 << ((Control & QSize) >> 4), MaxVectors);

    private int Data => Is64Bit ? 12 : 8;

    private int Mask => Is64Bit ? 16 : 12;

    private int Pending => Mask + 4;

    /// <summary>Tells whether the guest masked a vector.</summary>
    public bool IsMasked(int vector) => IsMaskable && (_config.GetUInt32(Offset + Mask) >> vector & 1) != 0;

    /// <summary>Returns the message of a vector.</summary>
    /// <param name="vector">Below <see cref="Vectors"/>.</param>
    public MsiMessage Message(int vector)
    {
        ulong address = Is64Bit ? _config.GetUInt64(Offset + AddressLow) : _config.GetUInt32(Offset + AddressLow);
        uint data = _config.GetUInt16(Offset + Data);
        return new MsiMessage(address, Vectors > 1 ? (data & ~((uint)Vectors - 1)) | (uint)vector : data);
    }

    /// <summary>Raises a vector: sends its message, or sets its pending bit while it is masked. Does nothing while MSI is disabled.</summary>
    /// <param name="vector">Ignored if the guest did not allocate this vector.</param>
    public void Notify(int vector)
    {
        if (!IsEnabled || (uint)vector >= (uint)Vectors) return;
        if (Redirect is { } redirect) redirect(vector);
        else if (IsMasked(vector)) _config.SetUInt32(Offset + Pending, _config.GetUInt32(Offset + Pending) | 1U << vector);
        else _send(Message(vector));
    }

    /// <summary>Handles a guest's write to configuration space: limits the vector count and sends pending messages that are no longer masked.</summary>
    /// <returns>True if MSI is enabled and the write touched it; INTx must then be off.</returns>
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

    /// <summary>Sets the power-on state: disabled, all registers zero.</summary>
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
