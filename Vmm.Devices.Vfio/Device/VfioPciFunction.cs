using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

/// <summary>What a VFIO function's options say.</summary>
internal sealed record VfioPciFunctionOptions(PciDeviceOptions Pci, bool NoMmap, bool NoKvmIntx, bool SkipVscCheck);

/// <summary>
/// The PCI function that the guest sees: emulated where QEMU's vfio-pci emulates, forwarded to the device everywhere else. BQL: held, except
/// for BAR accesses, which may wait for the device (QEMU: <c>VFIOPCIDevice</c>).
/// </summary>
internal sealed partial class VfioPciFunction : PciDevice
{
    private readonly VfioDeviceAccess _access;
    private readonly VfioBar?[] _bars = new VfioBar?[PciBar.Rom + 1];
    private readonly Bql _bql;
    private readonly bool _skipVscCheck;
    private readonly IDeviceServices _services;
    private readonly List<(GuestRange Range, IDisposable Slot)> _direct = [];
    private ulong _configRegionBytes;
    private bool _postWrites, _busMaster;

    /// <summary>Plugs the function and reads the device's configuration space once. Call <see cref="Realize"/> next; dispose it if that fails.</summary>
    internal VfioPciFunction(VfioPciFunctionOptions options, VfioDeviceAccess access, IDeviceServices services) : base(services.Pci, options.Pci)
    {
        (_access, _bql, _skipVscCheck, _services) = (access, services.Bql, options.SkipVscCheck, services);
        _emulated = new byte[Config.SizeBytes];
        Irqs = new VfioIrqs(access, this, services, mayUseIrqFd: !options.NoKvmIntx);
    }

    internal VfioIrqs Irqs { get; }

    /// <inheritdoc/>
    protected override bool BarsNeedBql => false;

    /// <summary>As in QEMU: shows the device's own pending bits, unless a masked vector has signalled its eventfd.</summary>
    protected override bool EmulatesPba => Msix!.AnyPending;

    private IVfioDeviceIo Io => _access.Io;

    /// <summary>Builds configuration space, BARs and capabilities from the device (QEMU: <c>vfio_realize</c>).</summary>
    /// <exception cref="VfioException">The device cannot be shown to a guest.</exception>
    internal void Realize(bool noMmap)
    {
        VfioDeviceInfo info = Io.Info;
        if (!info.IsPci) throw Unfit("not a PCI device");
        if (info.RegionCount <= VfioPciRegion.Config) throw Unfit($"expected at least {VfioPciRegion.Config + 1} regions, found {info.RegionCount}");
        if (info.IrqCount <= VfioPciIrq.Msix) throw Unfit($"expected at least {VfioPciIrq.Msix + 1} interrupt indices, found {info.IrqCount}");
        byte[] device = ReadDeviceConfig() ?? throw Unfit("its configuration space cannot be read");
        try
        {
            TakeConfig(device);
            SizeRom();
            AddBars(device);
            MsixLayout? msix = AddCapabilities();
            for (int n = 0; n < PciBar.Rom && !noMmap; n++) _bars[n]?.MapAreas(n, msix);
        }
        catch (ArgumentException e)
        {
            throw new VfioException($"device '{Id}' ({Io.Name}): {e.Message}", Errno.EINVAL, e);
        }
        _postWrites = !_bars.Any(static b => b?.HasMappings == true);
        // Clears command bits that a former user left: the device neither decodes nor masters the bus until the guest says so.
        var command = (PciCommand)BinaryPrimitives.ReadUInt16LittleEndian(device.AsSpan(PciRegisters.Command));
        if ((command & DecodeBits) != 0) base.ConfigWrite(PciRegisters.Command, 2, ForwardCommand(command & ~DecodeBits));
    }

    /// <inheritdoc/>
    protected override ulong BarRead(int bar, ulong offset, int size)
    {
        ulong value = _bars[bar]?.Read(offset, size, direct: !IsPba(bar, offset, size)) ?? PciHost.AllOnes(size);
        ServeIntx();
        return value;
    }

    /// <inheritdoc/>
    protected override void BarWrite(int bar, ulong offset, int size, ulong value)
    {
        if (bar != PciBar.Rom) _bars[bar]?.Write(offset, size, value, _postWrites);
        ServeIntx();
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        using (_bql.Acquire())
        {
            Irqs?.Dispose();
            foreach ((_, IDisposable slot) in _direct ?? []) slot.Dispose();
            _direct?.Clear();
        }
        base.Dispose(disposing);
        foreach (VfioBar? bar in _bars ?? []) bar?.Dispose();
    }

    private const PciCommand DecodeBits = PciCommand.Io | PciCommand.Memory | PciCommand.Master | PciCommand.IntxDisable;

    private VfioException Unfit(string why) => new($"device '{Id}' ({Io.Name}): {why}", Errno.EINVAL);

    /// <summary>Takes an access to any BAR as the guest's acknowledgement of INTx, because the registers that acknowledge are not known.</summary>
    private void ServeIntx()
    {
        if (!Irqs.IsIntxPending) return;
        using (_bql.Acquire()) Irqs.IntxEoi();
    }

    /// <summary>
    /// Shows mapped areas to the guest as memory, where the accelerator can; not while this process raises the pin, because it then learns from
    /// accesses to BARs that the guest has served it (QEMU: <c>vfio_mmap_set_enabled</c>).
    /// </summary>
    private void MapDirect()
    {
        if (_services.Accelerator is not { } accelerator) return;
        var wanted = new List<(GuestRange Range, MappedRegion Mapping, ulong Offset)>();
        for (int n = 0; n < PciBar.Rom && !Irqs.NeedsTraps && !_access.IsLost; n++)
            if (Bar(n) is { IsIo: false, Address: { } at }) wanted.AddRange(_bars[n]!.DirectAreas(n, at, Msix?.Layout));
        for (int i = _direct.Count - 1; i >= 0; i--)
        {
            if (wanted.Exists(w => w.Range == _direct[i].Range)) continue;
            _direct[i].Slot.Dispose();
            _direct.RemoveAt(i);
        }
        foreach ((GuestRange range, MappedRegion mapping, ulong offset) in wanted)
            if (!_direct.Exists(d => d.Range == range) && accelerator.MapMmio(range, mapping, offset) is { } slot) _direct.Add((range, slot));
    }

    /// <summary>Takes the mapped areas of a lost device from the guest, which then reads all ones there too.</summary>
    internal void FollowLoss() => MapDirect();

    /// <summary>Checks that the device that has taken a lost one's place is what the guest knows, and maps its areas. The VM is stopped; a reset follows.</summary>
    /// <exception cref="VfioException">It is another device.</exception>
    internal void TakeNewDevice()
    {
        byte[] device = ReadDeviceConfig() ?? throw Unfit("the configuration space of the new device cannot be read");
        for (int i = 0; i < device.Length; i++)
        {
            int checkedBits = Config.CheckedBits(i) & ~_emulated[i];
            if (((device[i] ^ Config.Bytes[i]) & checkedBits) != 0)
                throw Unfit($"the new device is another one: byte 0x{i:x} of its configuration space is 0x{device[i]:x2}, 0x{Config.Bytes[i]:x2} expected");
        }
        // The guest's ways into the old areas end before the areas do; the reset maps the new ones.
        foreach ((_, IDisposable slot) in _direct) slot.Dispose();
        _direct.Clear();
        for (int n = 0; n < PciBar.Rom; n++)
        {
            if (_bars[n] is not { HasMappings: true } bar) continue;
            bar.Unmap();
            bar.MapAreas(n, Msix?.Layout);
        }
    }

    /// <summary>Called after the VM started or stopped, which changes how the pin is raised and so how BARs are accessed.</summary>
    internal void FollowRunState(bool running)
    {
        Irqs.FollowIntx();
        if (running) MapDirect();
    }

    private bool IsPba(int bar, ulong offset, int size) =>
        Msix?.Layout is { } l && l.PbaBar == bar && offset < l.PbaOffset + (ulong)l.PbaBytes && offset + (ulong)size > l.PbaOffset;

    /// <summary>The configuration space, as much as the device has; null when it cannot be read.</summary>
    private byte[]? ReadDeviceConfig()
    {
        _configRegionBytes = Io.GetRegionInfo(VfioPciRegion.Config).SizeBytes;
        var bytes = new byte[Config.SizeBytes];
        int length = (int)Math.Min((ulong)bytes.Length, _configRegionBytes);
        return length >= PciRegisters.HeaderBytes && _access.Read(VfioPciRegion.Config, 0, bytes.AsSpan(0, length)) ? bytes : null;
    }

    /// <summary>The ROM keeps the device's size; its register is emulated and its content read on demand (QEMU: <c>vfio_pci_size_rom</c>).</summary>
    private void SizeRom()
    {
        VfioRegionInfo info = Io.GetRegionInfo(VfioPciRegion.Rom);
        if (Io is IVfioCprIo { AnswersProbes: false })
        {
            // Sizing would write the register; where that is forbidden, the region's size serves as well.
            if (!info.IsPresent || info.SizeBytes > int.MaxValue) return;
            _bars[PciBar.Rom] = new VfioBar(_access, info, PciBarType.Memory32);
            RegisterBar(PciBar.Rom, PciBarType.Memory32, System.Numerics.BitOperations.RoundUpToPowerOf2((uint)info.SizeBytes));
            return;
        }
        Span<byte> before = stackalloc byte[4], probe = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(probe, PciRegisters.RomAddressMask);
        if (!_access.Read(VfioPciRegion.Config, PciRegisters.RomAddress, before) || !_access.Write(VfioPciRegion.Config, PciRegisters.RomAddress, probe)
            || !_access.Read(VfioPciRegion.Config, PciRegisters.RomAddress, probe) || !_access.Write(VfioPciRegion.Config, PciRegisters.RomAddress, before))
        {
            if (info.IsPresent) VfioLog.RomNotSized(_access.Logger, Id);
            return;
        }
        uint size = ~(BinaryPrimitives.ReadUInt32LittleEndian(probe) & PciRegisters.RomAddressMask) + 1;
        if (size == 0 || !info.IsPresent) return;
        _bars[PciBar.Rom] = new VfioBar(_access, info, PciBarType.Memory32);
        RegisterBar(PciBar.Rom, PciBarType.Memory32, size);
    }

    private void AddBars(ReadOnlySpan<byte> device)
    {
        for (int n = 0; n < PciBar.Rom; n++)
        {
            VfioRegionInfo info = Io.GetRegionInfo(VfioPciRegion.Bar0 + (uint)n);
            if (!info.IsPresent) continue;
            int register = device[PciRegisters.BaseAddress0 + 4 * n];
            PciBarType type = (register & 1) != 0 ? PciBarType.Io : (PciBarType)register & (PciBarType.Memory64 | PciBarType.Prefetchable);
            if (info.SizeBytes > 1UL << 62) throw new ArgumentException($"BAR {n} has 0x{info.SizeBytes:x} bytes");
            var bar = new VfioBar(_access, info, type);
            _bars[n] = bar;
            RegisterBar(n, type, bar.SizeBytes);
        }
    }
}
