using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Core.Pci;

/// <summary>What a function needs to be plugged.</summary>
public sealed record PciDeviceOptions
{
    /// <summary>The device's id.</summary>
    public required string Id { get; init; }

    /// <summary>Slot and function as <c>addr=</c> gives them, or null for the next free slot.</summary>
    public string? Address { get; init; }

    /// <summary>4096 bytes of configuration space.</summary>
    public bool IsExpress { get; init; }

    /// <summary>The slot has more functions (QEMU: <c>multifunction=on</c>).</summary>
    public bool IsMultiFunction { get; init; }
}

/// <summary>
/// A PCI function: configuration space, BARs, INTx, MSI and MSI-X, as QEMU's core emulates them (QEMU: <c>PCIDevice</c>). An emulated device
/// derives from it, registers BARs in its constructor, and saves its state with <see cref="PciState"/> as the first field. BQL: held for every
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

    /// <summary>Plugs the function; nothing decodes yet.</summary>
    /// <param name="host">The VM's bus.</param>
    /// <param name="options">Where and what.</param>
    /// <exception cref="ConfigurationException">The address is malformed, in use, or there is none left.</exception>
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

    /// <summary>Device path, the prefix of its section names: <c>0000:00:02.0</c>.</summary>
    public string Path => Address.ToString();

    /// <summary>The bus.</summary>
    public PciHost Host { get; }

    /// <summary>Configuration space.</summary>
    public PciConfigSpace Config => _config;

    /// <summary>MSI, or null.</summary>
    public MsiCapability? Msi { get; private set; }

    /// <summary>MSI-X, or null.</summary>
    public MsixTable? Msix => _msix;

    /// <summary>Whether it may master the bus.</summary>
    public bool IsBusMaster => (_config.Command & PciCommand.Master) != 0;

    /// <summary>Whether its INTx is asserted, even if the guest disabled it.</summary>
    public bool IsIntxAsserted => _irqState != 0;

    internal bool IsMultiFunction { get; }

    /// <summary>Whether <see cref="BarRead"/> and <see cref="BarWrite"/> want the BQL; a device that may block in there says false.</summary>
    protected virtual bool BarsNeedBql => true;

    /// <summary>Whether reads of the MSI-X pending bits are answered from the emulated ones.</summary>
    protected virtual bool EmulatesPba => true;

    /// <summary>A BAR by number.</summary>
    /// <param name="number">0 to 5, or <see cref="PciBar.Rom"/>.</param>
    /// <returns>The BAR, or null.</returns>
    public PciBar? Bar(int number) => _bars[number];

    /// <summary>A guest's read of configuration space.</summary>
    /// <param name="offset">Inside the space.</param>
    /// <param name="size">1, 2 or 4.</param>
    /// <returns>The value.</returns>
    public virtual uint ConfigRead(int offset, int size) => _config.Read(offset, size);

    /// <summary>A guest's write to configuration space (QEMU: <c>pci_default_write_config</c>).</summary>
    /// <param name="offset">Inside the space.</param>
    /// <param name="size">1, 2 or 4.</param>
    /// <param name="value">The value.</param>
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

    /// <summary>Sets the level of the function's pin (QEMU: <c>pci_set_irq</c>); nothing without a pin.</summary>
    /// <param name="level">Asserted.</param>
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

    /// <summary>Power-on state of what the core keeps: command, BARs, interrupts (QEMU: <c>pci_do_device_reset</c>).</summary>
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

    /// <summary>Unplugs the function; an override ends what it started, then calls this.</summary>
    /// <param name="disposing">True.</param>
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

    /// <summary>A guest's read of a BAR, MSI-X structures excepted. BQL: as <see cref="BarsNeedBql"/> says.</summary>
    /// <param name="bar">The BAR.</param>
    /// <param name="offset">In the BAR.</param>
    /// <param name="size">1, 2, 4 or 8, inside it.</param>
    /// <returns>The value.</returns>
    protected virtual ulong BarRead(int bar, ulong offset, int size) => PciHost.AllOnes(size);

    /// <summary>A guest's write to a BAR, MSI-X structures excepted. BQL: as <see cref="BarsNeedBql"/> says.</summary>
    /// <param name="bar">The BAR.</param>
    /// <param name="offset">In the BAR.</param>
    /// <param name="size">1, 2, 4 or 8, inside it.</param>
    /// <param name="value">The value.</param>
    protected virtual void BarWrite(int bar, ulong offset, int size, ulong value)
    {
    }

    /// <summary>After the guest's or a loaded state's values have been taken over.</summary>
    protected virtual void OnConfigLoaded()
    {
    }

    /// <summary>Reads memory as a bus master (QEMU: <c>pci_dma_read</c>). Any thread of the device. BQL: not held.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="destination">Filled on success.</param>
    /// <returns>ENODEV while bus mastering is off; EFAULT where there is no memory; EAGAIN while the VM is stopped.</returns>
    protected Errno DmaRead(ulong address, Span<byte> destination)
    {
        Host.Bql.AssertNotHeld();
        return !IsBusMaster ? Errno.ENODEV : Host.Dma?.Read(address, destination) ?? Errno.EFAULT;
    }

    /// <summary>Writes memory as a bus master (QEMU: <c>pci_dma_write</c>). Any thread of the device. BQL: not held.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="source">Bytes.</param>
    /// <returns>As <see cref="DmaRead"/>.</returns>
    protected Errno DmaWrite(ulong address, ReadOnlySpan<byte> source)
    {
        Host.Bql.AssertNotHeld();
        return !IsBusMaster ? Errno.ENODEV : Host.Dma?.Write(address, source) ?? Errno.EFAULT;
    }

    /// <summary>Sends vectors by their number instead of as messages, for a function whose client keeps the messages. BQL: held.</summary>
    /// <param name="msi">Takes vectors of MSI.</param>
    /// <param name="msix">Takes vectors of MSI-X.</param>
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
    /// <param name="type">Type bits.</param>
    /// <param name="sizeBytes">A power of two: at least 4 for ports, 16 for memory, 2048 for a ROM.</param>
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

    /// <summary>Adds MSI.</summary>
    /// <param name="offset">Where in configuration space.</param>
    /// <param name="vectors">1 to 32, a power of two.</param>
    /// <param name="is64Bit">Takes 64-bit addresses.</param>
    /// <param name="isMaskable">Has a mask bit a vector.</param>
    protected void AddMsi(int offset, int vectors, bool is64Bit, bool isMaskable) =>
        Msi = new MsiCapability(_config, offset, vectors, is64Bit, isMaskable, SendMsi);

    /// <summary>Adds MSI-X; its structures must be inside BARs that were registered before.</summary>
    /// <param name="offset">Where in configuration space.</param>
    /// <param name="layout">Where the structures are.</param>
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

    /// <summary>Makes BARs decode where the registers say (QEMU: <c>pci_update_mappings</c>).</summary>
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

    /// <summary>A message is a write to memory, so a function that may not master the bus sends none.</summary>
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
