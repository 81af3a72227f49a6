using System.Buffers.Binary;

namespace Vmm.Core.Pci;

/// <summary>Number of MSI-X vectors of a function, and the places of the table and the pending bits.</summary>
/// <param name="Vectors">1 to 2048.</param>
/// <param name="TableBar">Number of the BAR with the table.</param>
/// <param name="TableOffset">Offset of the table in that BAR, a multiple of 8.</param>
/// <param name="PbaBar">Number of the BAR with the pending bits.</param>
/// <param name="PbaOffset">Offset of the pending bits in that BAR, a multiple of 8.</param>
public readonly record struct MsixLayout(int Vectors, int TableBar, uint TableOffset, int PbaBar, uint PbaOffset)
{
    /// <summary>Largest number of vectors of a function.</summary>
    public const int MaxVectors = 2048;

    /// <summary>Length of the table: 16 bytes for each vector.</summary>
    public int TableBytes => Vectors * MsixTable.EntryBytes;

    /// <summary>Length of the pending bits: one bit for each vector, in whole u64 words.</summary>
    public int PbaBytes => (Vectors + 63) / 64 * 8;
}

/// <summary>
/// Hears which vectors the guest uses, so that a device delivers interrupts only for those (QEMU: <c>msix_set_vector_notifiers</c>). BQL: held.
/// </summary>
public interface IMsixVectorNotifier
{
    /// <summary>A vector became unmasked.</summary>
    /// <param name="vector">0 to the number of vectors - 1.</param>
    /// <param name="message">Its present message.</param>
    void UseVector(int vector, MsiMessage message);

    /// <summary>A vector became masked.</summary>
    void ReleaseVector(int vector);
}

/// <summary>
/// An emulated MSI-X capability with its table and pending bits (QEMU: <c>msix.c</c>). A table entry, little-endian: u64 address, u32 data,
/// u32 control, whose bit 0 masks the vector. BQL: held for every call.
/// </summary>
public sealed class MsixTable
{
    /// <summary>Length of the capability.</summary>
    public const int CapabilityBytes = 12;

    /// <summary>Length of a table entry.</summary>
    public const int EntryBytes = 16;

    private const int Flags = 2, Table = 4, Pba = 8, ControlOfEntry = 12;
    private const ushort Enable = 0x8000, MaskAll = 0x4000;

    private readonly PciConfigSpace _config;
    private readonly Action<MsiMessage> _send;
    private readonly byte[] _table, _pba;
    private IMsixVectorNotifier? _notifier;
    private bool _functionMasked = true;

    /// <summary>Adds the capability, disabled and with all vectors masked, at the head of the chain.</summary>
    /// <param name="config">Configuration space of the function.</param>
    /// <param name="offset">Offset of the capability in it.</param>
    /// <param name="layout">Number of vectors and places of the structures.</param>
    /// <param name="send">Called with each message to send.</param>
    /// <exception cref="ArgumentException">The layout is impossible, or the capability does not fit at the offset.</exception>
    public MsixTable(PciConfigSpace config, int offset, MsixLayout layout, Action<MsiMessage> send)
    {
        ArgumentNullException.ThrowIfNull(config);
        ArgumentOutOfRangeException.ThrowIfLessThan(layout.Vectors, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(layout.Vectors, MsixLayout.MaxVectors);
        if (((layout.TableOffset | layout.PbaOffset) & 7) != 0) throw new ArgumentException($"MSI-X structures must be aligned to 8 bytes: {layout}");
        (_config, Offset, Layout, _send) = (config, offset, layout, send);
        (_table, _pba) = (new byte[layout.TableBytes], new byte[layout.PbaBytes]);
        config.AddCapability(PciCapabilityId.Msix, offset, CapabilityBytes);
        config.SetUInt16(offset + Flags, (ushort)(layout.Vectors - 1));
        config.SetUInt32(offset + Table, layout.TableOffset | (uint)layout.TableBar);
        config.SetUInt32(offset + Pba, layout.PbaOffset | (uint)layout.PbaBar);
        config.WMask[offset + Flags + 1] = (Enable | MaskAll) >> 8;
        MaskAllEntries();
    }

    /// <summary>Offset of the capability in configuration space.</summary>
    public int Offset { get; }

    /// <summary>Number of vectors and places of the structures.</summary>
    public MsixLayout Layout { get; }

    /// <summary>Number of vectors.</summary>
    public int Vectors => Layout.Vectors;

    /// <summary>If set, receives raised vectors instead of <c>send</c>; the owner of the delegate then has the table and its mask bits.</summary>
    internal Action<int>? Redirect { get; set; }

    /// <summary>True if the guest has enabled MSI-X.</summary>
    public bool IsEnabled => (Control & Enable) != 0;

    /// <summary>The control word as the guest sees it.</summary>
    public ushort Control => _config.GetUInt16(Offset + Flags);

    /// <summary>True if at least one vector is pending.</summary>
    public bool AnyPending => _pba.AsSpan().ContainsAnyExcept((byte)0);

    /// <summary>The bytes of the table.</summary>
    public ReadOnlySpan<byte> TableBytes => _table;

    /// <summary>The pending bits as saved: one bit for each vector, in whole bytes.</summary>
    public ReadOnlySpan<byte> PbaBytes => _pba.AsSpan(0, (Vectors + 7) / 8);

    /// <summary>Tells whether a vector is masked: by its own bit, by the bit for all vectors, or because MSI-X is disabled.</summary>
    /// <returns>True if the vector becomes pending when it is raised.</returns>
    public bool IsMasked(int vector) => _functionMasked || EntryMasked(vector);

    /// <summary>Tells whether a vector is pending: raised while it was masked.</summary>
    public bool IsPending(int vector) => (_pba[vector / 8] >> (vector % 8) & 1) != 0;

    /// <summary>Returns the message of a vector.</summary>
    public MsiMessage Message(int vector)
    {
        ReadOnlySpan<byte> entry = _table.AsSpan(vector * EntryBytes, EntryBytes);
        return new MsiMessage(BinaryPrimitives.ReadUInt64LittleEndian(entry), BinaryPrimitives.ReadUInt32LittleEndian(entry[8..]));
    }

    /// <summary>Raises a vector: sends its message, or sets its pending bit while it is masked.</summary>
    /// <param name="vector">Ignored if the function has no such vector.</param>
    public void Notify(int vector)
    {
        if ((uint)vector >= (uint)Vectors) return;
        if (Redirect is { } redirect && IsEnabled) redirect(vector);
        else if (IsMasked(vector)) _pba[vector / 8] |= (byte)(1 << vector % 8);
        else _send(Message(vector));
    }

    /// <summary>Clears the pending bit of a vector.</summary>
    public void ClearPending(int vector) => _pba[vector / 8] &= (byte)~(1 << vector % 8);

    /// <summary>Sets or removes the notifier. A new one hears of every vector in use at once; a removed one hears nothing.</summary>
    /// <param name="notifier">The notifier, or null.</param>
    public void SetNotifier(IMsixVectorNotifier? notifier)
    {
        _notifier = notifier;
        if (notifier is null || _functionMasked) return;
        for (int v = 0; v < Vectors; v++)
            if (!EntryMasked(v)) notifier.UseVector(v, Message(v));
    }

    /// <summary>Handles a guest's write to configuration space: applies the enable and mask bits.</summary>
    /// <returns>True if MSI-X is enabled and the write touched those bits; INTx must then be off.</returns>
    public bool ConfigWritten(int offset, int size)
    {
        int control = Offset + Flags + 1;
        if (control < offset || control >= offset + size) return false;
        bool was = _functionMasked;
        UpdateFunctionMasked();
        if (!IsEnabled) return false;
        if (_functionMasked == was) return true;
        for (int v = 0; v < Vectors; v++) MaskChanged(v, was || EntryMasked(v));
        return true;
    }

    /// <summary>Handles a guest's read of the table.</summary>
    /// <param name="offset">Offset in the table, bytes.</param>
    /// <param name="size">1 to 8 bytes, all inside the table.</param>
    public ulong ReadTable(int offset, int size) => Bytes(_table, offset, size);

    /// <summary>Handles a guest's write to the table. The specification allows only whole u32 or u64 values; other writes change nothing.</summary>
    /// <param name="offset">Offset in the table, bytes.</param>
    /// <param name="size">4 or 8 bytes; other sizes change nothing.</param>
    /// <param name="value">Little-endian.</param>
    public void WriteTable(int offset, int size, ulong value)
    {
        if (size < 4 || (offset & 3) != 0) return;
        for (int at = 0; at < size; at += 4, value >>= 32)
        {
            int vector = (offset + at) / EntryBytes;
            bool was = IsMasked(vector);
            BinaryPrimitives.WriteUInt32LittleEndian(_table.AsSpan(offset + at), (uint)value);
            MaskChanged(vector, was);
        }
    }

    /// <summary>Handles a guest's read of the pending bits; the guest cannot write them.</summary>
    /// <param name="offset">Offset in the pending bits, bytes.</param>
    /// <param name="size">1 to 8 bytes, all inside the pending bits.</param>
    public ulong ReadPba(int offset, int size) => Bytes(_pba, offset, size);

    /// <summary>Sets the power-on state: disabled, the table zero except for the mask bits, nothing pending.</summary>
    public void Reset()
    {
        _config.Bytes[Offset + Flags + 1] &= unchecked((byte)~((Enable | MaskAll) >> 8));
        _functionMasked = true;
        _table.AsSpan().Clear();
        _pba.AsSpan().Clear();
        MaskAllEntries();
    }

    /// <summary>Loads a saved table, after configuration space (QEMU: <c>msix_load</c>).</summary>
    internal void Load(ReadOnlySpan<byte> table, ReadOnlySpan<byte> pba)
    {
        _pba.AsSpan().Clear();
        table.CopyTo(_table);
        pba.CopyTo(_pba);
        // Bits after the last vector have no meaning, but a peer may have set them.
        if (Vectors % 8 != 0) _pba[Vectors / 8] &= (byte)((1 << Vectors % 8) - 1);
        UpdateFunctionMasked();
        for (int v = 0; v < Vectors; v++) MaskChanged(v, wasMasked: true);
    }

    private static ulong Bytes(byte[] from, int offset, int size)
    {
        ulong value = 0;
        for (int i = 0; i < size; i++) value |= (ulong)from[offset + i] << (8 * i);
        return value;
    }

    private bool EntryMasked(int vector) => (_table[vector * EntryBytes + ControlOfEntry] & 1) != 0;

    private void UpdateFunctionMasked() => _functionMasked = (Control & (Enable | MaskAll)) != Enable;

    private void MaskAllEntries()
    {
        for (int v = 0; v < Vectors; v++) _table[v * EntryBytes + ControlOfEntry] = 1;
    }

    private void MaskChanged(int vector, bool wasMasked)
    {
        bool masked = IsMasked(vector);
        if (masked == wasMasked) return;
        if (masked) _notifier?.ReleaseVector(vector);
        else _notifier?.UseVector(vector, Message(vector));
        if (masked || !IsPending(vector)) return;
        ClearPending(vector);
        Notify(vector);
    }
}
