using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Core.Pci;

/// <summary>Options of a PCI function.</summary>
public sealed record PciDeviceOptions
{
    /// <summary>The device's id.</summary>
    public required string Id { get; init; }

    /// <summary>Slot and function in the syntax of <c>addr=</c>; null for the next free slot.</summary>
    public string? Address { get; init; }

    /// <summary>True for 4096 bytes of configuration space, false for 256.</summary>
    public bool IsExpress { get; init; }

    /// <summary>True if the slot has more functions (QEMU: <c>multifunction=on</c>).</summary>
    public bool IsMultiFunction { get; init; }
}

/// <summary>
/// A PCI function: configuration space, BARs, INTx, MSI and MSI-X, emulated as in QEMU's core (QEMU: <c>PCIDevice</c>). An emulated device derives
/// from this class, registers its BARs in its constructor, and saves <see cref="PciState"/> as the first field of its state. BQL: held for every
/// call, except where a member says otherwise.
/// </summary>
public abstract partial class PciDevice : INamedPart, IDisposable
{
    private const int Pins = 4;

    private readonly PciBar?[] _bars = new PciBar?[PciBar.Rom + 1];
    private PciConfigSpace _config;
    private MsixTable? _msix;
    private uint _irqState;
    private bool _detached;

    /// <summary>Plugs the function into a bus; it decodes no BAR yet.</summary>
    /// <param name="host">Bus of the function's VM.</param>
    /// <param name="options">Id, address and kind of the function.</param>
    /// <exception cref="ConfigurationException">The address is malformed or in use, or no slot is free.</exception>
    protected PciDevice(PciHost host, PciDeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(host);
        ArgumentNullException.ThrowIfNull(options);
        (Host, Id, IsMultiFunction) = (host, options.Id, options.IsMultiFunction);
        _config = new PciConfigSpace(options.IsExpress);
        Address = host.Attach(this, options.Address is { } address ? PciAddress.Parse(address) : null);
        if (IsMultiFunction) _config.Bytes[PciRegisters.HeaderType] |= PciRegisters.HeaderTypeMultiFunction;
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <summary>Slot and function.</summary>
    public PciAddress Address { get; }

    /// <summary>Device path, which prefixes the names of its sections: <c>0000:00:02.0</c>.</summary>
    public string Path => Address.ToString();

    /// <summary>The bus.</summary>
    public PciHost Host { get; }

    /// <summary>Configuration space.</summary>
    public PciConfigSpace Config => _config;

    /// <summary>The MSI capability, or null.</summary>
    public MsiCapability? Msi { get; private set; }

    /// <summary>The MSI-X capability, or null.</summary>
    public MsixTable? Msix => _msix;

    /// <summary>True if the guest lets the function master the bus: DMA and MSI.</summary>
    public bool IsBusMaster => (_config.Command & PciCommand.Master) != 0;

    /// <summary>True if the function asserts INTx, even while the guest has it disabled.</summary>
    public bool IsIntxAsserted => _irqState != 0;

    internal bool IsMultiFunction { get; }

    /// <summary>True if <see cref="BarRead"/> and <see cref="BarWrite"/> need the BQL. A device that may block in them overrides this.</summary>
    protected virtual bool BarsNeedBql => true;

    /// <summary>True if the emulated MSI-X pending bits answer a guest's reads of the PBA; false if the device does.</summary>
    protected virtual bool EmulatesPba => true;

    /// <summary>Returns a BAR, or null if the function has none of this number.</summary>
    /// <param name="number">0 to 5, or <see cref="PciBar.Rom"/>.</param>
    public PciBar? Bar(int number) => _bars[number];

    /// <summary>Handles a guest's read of configuration space.</summary>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    public virtual uint ConfigRead(int offset, int size) => _config.Read(offset, size);

    /// <summary>Handles a guest's write to configuration space (QEMU: <c>pci_default_write_config</c>).</summary>
    /// <param name="offset">Offset in the space, bytes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="value">Little-endian.</param>
    public virtual void ConfigWrite(int offset, int size, uint value)
    {
        Host.Bql.AssertHeld();
        bool wasDisabled = IsIntxDisabled;
        _config.Write(offset, size, value);
        bool command = offset <= PciRegisters.Command + 1 && offset + size > PciRegisters.Command;
        if (command || (offset < PciRegisters.RomAddress + 4 && offset + size > PciRegisters.BaseAddress0)) UpdateMappings();
        if (command && IsIntxDisabled != wasDisabled) ShowPins(!IsIntxDisabled);
        if (Msi?.ConfigWritten(offset, size) == true) DeassertIntx();
        if (Msix?.ConfigWritten(offset, size) == true) DeassertIntx();
    }

    /// <summary>Sets the level of the function's pin (QEMU: <c>pci_set_irq</c>). Does nothing if the function has no pin.</summary>
    /// <param name="level">True to assert the pin.</param>
    public void SetIntx(bool level)
    {
        Host.Bql.AssertHeld();
        int pin = _config.Bytes[PciRegisters.InterruptPin] - 1;
        if ((uint)pin >= Pins) return;
        uint bit = 1U << pin;
        if ((_irqState & bit) != 0 == level) return;
        _irqState ^= bit;
        UpdateIrqStatus();
        if (!IsIntxDisabled) Host.ChangeIrqLevel(Address.Slot, pin, level ? 1 : -1);
    }

    /// <summary>Sets the power-on state of command register, BARs and interrupts (QEMU: <c>pci_do_device_reset</c>).</summary>
    public virtual void Reset()
    {
        DeassertIntx();
        ClearWritable(PciRegisters.Command, 4);
        ClearWritable(PciRegisters.InterruptLine, 1);
        _config.Bytes[PciRegisters.CacheLineSize] = 0;
        foreach (PciBar? bar in _bars)
            if (bar is not null) ResetBarRegister(bar);
        UpdateMappings();
        Msi?.Reset();
        Msix?.Reset();
    }

    /// <summary>Unplugs the function.</summary>
    public void Dispose()
    {
        if (!_detached) Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Unplugs the function. An override ends what it started and then calls this method.</summary>
    protected virtual void Dispose(bool disposing)
    {
        using (Host.Bql.Acquire())
        {
            if (_detached) return;
            DeassertIntx();
            _detached = true;
            foreach (PciBar? bar in _bars)
                if (bar is not null) bar.Address = null;
            Host.Detach(this);
        }
    }

    /// <summary>Handles a guest's read of a BAR outside the MSI-X structures. BQL: held if <see cref="BarsNeedBql"/>.</summary>
    /// <param name="bar">0 to 5, or <see cref="PciBar.Rom"/>.</param>
    /// <param name="offset">Offset in the BAR, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the BAR.</param>
    protected virtual ulong BarRead(int bar, ulong offset, int size) => PciHost.AllOnes(size);

    /// <summary>Handles a guest's write to a BAR outside the MSI-X structures. BQL: held if <see cref="BarsNeedBql"/>.</summary>
    /// <param name="bar">0 to 5, or <see cref="PciBar.Rom"/>.</param>
    /// <param name="offset">Offset in the BAR, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes, all inside the BAR.</param>
    /// <param name="value">Little-endian.</param>
    protected virtual void BarWrite(int bar, ulong offset, int size, ulong value)
    {
    }

    /// <summary>Runs after a load has replaced the values of configuration space.</summary>
    protected virtual void OnConfigLoaded()
    {
    }

    /// <summary>Reads memory as a bus master (QEMU: <c>pci_dma_read</c>). Any thread of the device. BQL: not held.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="destination">Filled on success.</param>
    /// <returns>ENODEV while bus mastering is off; EFAULT if part of the range is not memory; EAGAIN while the VM of a served function is stopped.</returns>
    protected Errno DmaRead(ulong address, Span<byte> destination)
    {
        Host.Bql.AssertNotHeld();
        return !IsBusMaster ? Errno.ENODEV : Host.Dma?.Read(address, destination) ?? Errno.EFAULT;
    }

    /// <summary>Writes memory as a bus master (QEMU: <c>pci_dma_write</c>). Any thread of the device. BQL: not held.</summary>
    /// <returns>As <see cref="DmaRead"/>.</returns>
    protected Errno DmaWrite(ulong address, ReadOnlySpan<byte> source)
    {
        Host.Bql.AssertNotHeld();
        return !IsBusMaster ? Errno.ENODEV : Host.Dma?.Write(address, source) ?? Errno.EFAULT;
    }

    /// <summary>Passes on the numbers of raised vectors instead of messages, for a function whose client keeps the messages. BQL: held.</summary>
    /// <param name="msi">Gets the numbers of MSI vectors.</param>
    /// <param name="msix">Gets the numbers of MSI-X vectors.</param>
    public void RedirectVectors(Action<int> msi, Action<int> msix)
    {
        if (Msi is not null) Msi.Redirect = v => Redirect(msi, v);
        if (_msix is not null) _msix.Redirect = v => Redirect(msix, v);

        void Redirect(Action<int> to, int vector)
        {
            if (IsBusMaster) to(vector);
        }
    }

    /// <summary>Adds a BAR (QEMU: <c>pci_register_bar</c>).</summary>
    /// <param name="number">0 to 5, or <see cref="PciBar.Rom"/>.</param>
    /// <param name="type">Type bits of the BAR's register.</param>
    /// <param name="sizeBytes">A power of two: at least 4 for ports, 16 for memory, 2048 for a ROM.</param>
    /// <exception cref="ArgumentException">The size is impossible, or the number is taken or out of range.</exception>
    protected void RegisterBar(int number, PciBarType type, ulong sizeBytes)
    {
        var bar = new PciBar(number, type, sizeBytes);
        ulong least = number == PciBar.Rom ? 2048UL : bar.IsIo ? 4UL : 16UL;
        if (sizeBytes < least || (sizeBytes & (sizeBytes - 1)) != 0 || (!bar.Is64Bit && sizeBytes > 1UL << 31))
            throw new ArgumentOutOfRangeException(nameof(sizeBytes), $"BAR {number} cannot have 0x{sizeBytes:x} bytes");
        if (number is < 0 or > PciBar.Rom || _bars[number] is not null || (bar.Is64Bit && (number >= 5 || _bars[number + 1] is not null))
            || (number is > 0 and < PciBar.Rom && _bars[number - 1] is { Is64Bit: true }))
            throw new ArgumentException($"BAR {number} is taken or out of range", nameof(number));
        _bars[number] = bar;
        ulong writable = ~(sizeBytes - 1) | (number == PciBar.Rom ? (ulong)PciRegisters.RomEnable : 0);
        int width = bar.Is64Bit ? 8 : 4;
        for (int i = 0; i < width; i++) _config.WMask[bar.Register + i] = (byte)(writable >> (8 * i));
        _config.CMask.Slice(bar.Register, width).Fill(0xff);
        ResetBarRegister(bar);
    }

    /// <summary>Adds an MSI capability.</summary>
    /// <param name="offset">Offset in configuration space.</param>
    /// <param name="vectors">1, 2, 4, 8, 16 or 32.</param>
    /// <param name="is64Bit">True if the capability takes 64-bit addresses.</param>
    /// <param name="isMaskable">True if each vector has a mask bit.</param>
    /// <exception cref="ArgumentOutOfRangeException">Another number of vectors, or the capability does not fit at the offset.</exception>
    protected void AddMsi(int offset, int vectors, bool is64Bit, bool isMaskable) =>
        Msi = new MsiCapability(_config, offset, vectors, is64Bit, isMaskable, SendMsi);

    /// <summary>Adds an MSI-X capability. Its structures must lie in BARs that are registered already.</summary>
    /// <param name="offset">Offset in configuration space.</param>
    /// <param name="layout">Number of vectors and places of the structures.</param>
    /// <exception cref="ArgumentException">The structures overlap or are outside their BARs, or the capability does not fit at the offset.</exception>
    protected void AddMsix(int offset, MsixLayout layout)
    {
        CheckInside(layout.TableBar, layout.TableOffset, layout.TableBytes);
        CheckInside(layout.PbaBar, layout.PbaOffset, layout.PbaBytes);
        if (layout.TableBar == layout.PbaBar && layout.TableOffset < layout.PbaOffset + (ulong)layout.PbaBytes && layout.PbaOffset < layout.TableOffset + (ulong)layout.TableBytes)
            throw new ArgumentException($"MSI-X table and pending bits overlap: {layout}");
        _msix = new MsixTable(_config, offset, layout, SendMsi);

        void CheckInside(int number, ulong at, int length)
        {
            if (number is < 0 or >= PciBar.Rom || _bars[number] is not { IsIo: false } bar || at + (ulong)length > bar.SizeBytes)
                throw new ArgumentException($"MSI-X structures are outside memory BAR {number}: {layout}");
        }
    }

    /// <summary>Makes the BARs decode at the addresses in their registers (QEMU: <c>pci_update_mappings</c>).</summary>
    protected void UpdateMappings()
    {
        bool changed = false;
        foreach (PciBar? bar in _bars)
        {
            if (bar is null) continue;
            ulong? now = _detached ? null : bar.AddressFrom(_config);
            changed |= now != bar.Address;
            bar.Address = now;
        }
        if (changed) Host.RebuildMappings();
    }

    /// <summary>Drops the message if the function may not master the bus, because a message is a write to memory.</summary>
    private void SendMsi(MsiMessage message)
    {
        if (IsBusMaster) Host.Interrupts.SendMsi(message, Address.DevFn);
    }

    private bool IsIntxDisabled => (_config.Command & PciCommand.IntxDisable) != 0;

    private void DeassertIntx()
    {
        for (int pin = 0; pin < Pins; pin++)
            if ((_irqState >> pin & 1) != 0 && !IsIntxDisabled) Host.ChangeIrqLevel(Address.Slot, pin, -1);
        _irqState = 0;
        UpdateIrqStatus();
    }

    private void ShowPins(bool shown)
    {
        for (int pin = 0; pin < Pins; pin++)
            if ((_irqState >> pin & 1) != 0) Host.ChangeIrqLevel(Address.Slot, pin, shown ? 1 : -1);
    }

    private void UpdateIrqStatus()
    {
        int status = _config.GetUInt16(PciRegisters.Status) & ~PciRegisters.StatusInterrupt;
        _config.SetUInt16(PciRegisters.Status, (ushort)(status | (_irqState != 0 ? PciRegisters.StatusInterrupt : 0)));
    }

    private void ClearWritable(int offset, int length)
    {
        for (int i = offset; i < offset + length; i++) _config.Bytes[i] &= (byte)~(_config.WMask[i] | _config.W1cMask[i]);
    }

    private void ResetBarRegister(PciBar bar)
    {
        if (bar.Is64Bit) _config.SetUInt64(bar.Register, (ulong)bar.Type);
        else _config.SetUInt32(bar.Register, (uint)bar.Type);
    }
}
