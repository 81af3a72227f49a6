using System.Buffers.Binary;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

// Configuration space. A set bit in _emulated is answered from the shadow, the others from the device; writes go to both.
internal sealed partial class VfioPciFunction
{
    private const int ExpressFlags = 2;

    private readonly byte[] _emulated;
    private int _powerManagement;

    /// <inheritdoc/>
    public override uint ConfigRead(int offset, int size)
    {
        uint all = (uint)PciHost.AllOnes(size);
        if (_access.IsLost) return all;
        uint emulated = 0;
        for (int i = 0; i < size; i++) emulated |= (uint)_emulated[offset + i] << (8 * i);
        if (emulated == all) return base.ConfigRead(offset, size);
        return ReadDevice(offset, size) is { } physical ? (base.ConfigRead(offset, size) & emulated) | (physical & ~emulated) : all;
    }

    /// <inheritdoc/>
    public override void ConfigWrite(int offset, int size, uint value)
    {
        // All writes go to the device, which itself ignores what it does not allow; a refusal is only logged.
        Forward(offset, size, KeepMsiShape(offset, size, value));
        bool wasMsi = Msi?.IsEnabled == true, wasMsix = Msix?.IsEnabled == true;
        Irqs.BeginBatch();
        base.ConfigWrite(offset, size, value);
        Irqs.EndBatch();
        Irqs.Follow(wasMsi, wasMsix);
        Irqs.FollowIntx();
        FollowBusMaster();
        Irqs.UpdateMessages();
        MapDirect();
    }

    /// <summary>Whether the device did the last <see cref="Reset"/>; not every device can.</summary>
    internal bool WasReset { get; private set; }

    /// <summary>Power-on state of function and device (QEMU: <c>vfio_pci_reset</c>).</summary>
    public override void Reset()
    {
        Irqs.DisableAll();
        PowerUp();
        // Stops DMA before the reset.
        if (ReadDevice(PciRegisters.Command, 2) is { } command) ForwardCommand((PciCommand)command & ~DecodeBits);
        WasReset = _access.Reset();
        base.Reset();
        FollowBusMaster();
        ReadShadow();
        Irqs.EnableByConfig();
        Irqs.FollowIntx();
        for (int bar = 0; bar < PciBar.Rom; bar++) Forward(PciRegisters.BaseAddress0 + 4 * bar, 4, 0);
        MapDirect();
    }

    private void FollowBusMaster()
    {
        if (IsBusMaster == _busMaster) return;
        _busMaster = IsBusMaster;
        _access.SetBusMaster(_busMaster);
    }

    private uint? ReadDevice(int offset, int size)
    {
        // A space smaller than it should be (mtty has 255 bytes) reads as zero behind its end.
        int length = (int)Math.Min((ulong)size, _configRegionBytes - Math.Min(_configRegionBytes, (ulong)offset));
        Span<byte> bytes = stackalloc byte[4];
        bytes.Clear();
        return length == 0 || _access.Read(VfioPciRegion.Config, (ulong)offset, bytes[..length]) ? BinaryPrimitives.ReadUInt32LittleEndian(bytes) : null;
    }

    private void Forward(int offset, int size, uint value)
    {
        int length = (int)Math.Min((ulong)size, _configRegionBytes - Math.Min(_configRegionBytes, (ulong)offset));
        if (length == 0) return;
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, value);
        _access.Write(VfioPciRegion.Config, (ulong)offset, bytes[..length]);
    }

    /// <summary>
    /// Keeps the read-only bits of MSI's control register, because the kernel stores a write whole: the process after this one would otherwise read
    /// wrong capabilities of the device.
    /// </summary>
    private uint KeepMsiShape(int offset, int size, uint value)
    {
        if (Msi is null) return value;
        for (int i = 0; i < size; i++)
        {
            if (offset + i - Msi.Offset is not (2 or 3)) continue;
            uint keep = (uint)(byte)~Config.WMask[offset + i] << (8 * i), own = (uint)Config.Bytes[offset + i] << (8 * i);
            value = (value & ~keep) | (own & keep);
        }
        return value;
    }

    private uint ForwardCommand(PciCommand command)
    {
        Forward(PciRegisters.Command, 2, (uint)command);
        return (uint)command;
    }

    private void PowerUp()
    {
        if (_powerManagement == 0) return;
        int at = _powerManagement + PciRegisters.PowerControl;
        if (ReadDevice(at, 2) is not { } control || (control & PciRegisters.PowerStateMask) == 0) return;
        Forward(at, 2, control & ~(uint)PciRegisters.PowerStateMask);
        if (ReadDevice(at, 2) is { } now && (now & PciRegisters.PowerStateMask) != 0)
            VfioLog.StuckInPowerState(_access.Logger, Id, (int)now & PciRegisters.PowerStateMask);
    }

    /// <summary>Starts the shadow from the device's bytes, without what belongs to the host (addresses, multifunction bit).</summary>
    private void TakeConfig(ReadOnlySpan<byte> device)
    {
        Span<byte> config = Config.Bytes;
        byte multiFunction = (byte)(config[PciRegisters.HeaderType] & PciRegisters.HeaderTypeMultiFunction);
        device.CopyTo(config);
        config[PciRegisters.HeaderType] = (byte)((config[PciRegisters.HeaderType] & ~PciRegisters.HeaderTypeMultiFunction) | multiFunction);
        config.Slice(PciRegisters.BaseAddress0, 24).Clear();
        config.Slice(PciRegisters.RomAddress, 4).Clear();
        config[PciRegisters.InterruptLine] = 0;
        _emulated[PciRegisters.HeaderType] = PciRegisters.HeaderTypeMultiFunction;
        _emulated.AsSpan(PciRegisters.BaseAddress0, 24).Fill(0xff);
        _emulated.AsSpan(PciRegisters.RomAddress, 4).Fill(0xff);
        _emulated[PciRegisters.InterruptLine] = 0xff;
    }

    /// <summary>Rebuilds the chain, so that capabilities may be left out, with MSI and MSI-X emulated (QEMU: <c>vfio_add_capabilities</c>).</summary>
    private MsixLayout? AddCapabilities()
    {
        IReadOnlyList<(byte Id, int Offset)> chain = Config.Capabilities(out bool broken);
        if (broken) VfioLog.BrokenCapabilityChain(_access.Logger, Id);
        if (chain.Count == 0) return null;
        Config.Bytes[PciRegisters.CapabilityList] = 0;
        _emulated[PciRegisters.CapabilityList] = 0xff;
        _emulated[PciRegisters.Status] |= (byte)PciRegisters.StatusCapabilityList;
        // Each capability is added at the head of the chain, so going backwards keeps the device's order.
        for (int i = chain.Count - 1; i >= 0; i--)
        {
            (byte Id, int Offset) c = chain[i];
            int end = chain.Select(static o => o.Offset).Where(o => o > c.Offset).DefaultIfEmpty(PciConfigSpace.LegacyBytes).Min();
            _emulated[c.Offset + 1] = 0xff;
            AddCapability(c, end - c.Offset);
        }
        if (Msi is not null) _emulated.AsSpan(Msi.Offset, Msi.SizeBytes).Fill(0xff);
        if (Msix is not null) _emulated.AsSpan(Msix.Offset, MsixTable.CapabilityBytes).Fill(0xff);
        return Msix?.Layout;
    }

    private void AddCapability((byte Id, int Offset) c, int room)
    {
        switch (c.Id)
        {
            case PciCapabilityId.Msi when Msi is null:
                ushort control = Config.GetUInt16(c.Offset + 2);
                AddMsi(c.Offset, 1 << (control >> 1 & 7), (control & 0x80) != 0, (control & 0x100) != 0);
                if (Msi!.SizeBytes > room) throw new ArgumentException($"MSI capability at 0x{c.Offset:x2} has {Msi.SizeBytes} bytes and room for {room}");
                break;
            case PciCapabilityId.Msix when Msix is null:
                if (room < MsixTable.CapabilityBytes) throw new ArgumentException($"MSI-X capability at 0x{c.Offset:x2} has room for {room} bytes");
                uint table = Config.GetUInt32(c.Offset + 4), pba = Config.GetUInt32(c.Offset + 8);
                AddMsix(c.Offset, new MsixLayout((Config.GetUInt16(c.Offset + 2) & 0x7ff) + 1, (int)(table & 7), table & ~7U, (int)(pba & 7), pba & ~7U));
                break;
            case PciCapabilityId.Express:
                Config.AddCapability(c.Id, c.Offset, room);
                CheckExpress(c.Offset + ExpressFlags);
                break;
            default:
                if (c.Id == PciCapabilityId.PowerManagement) _powerManagement = c.Offset;
                Config.AddCapability(c.Id, c.Offset, room);
                // Vendor data may differ between hosts that run the same firmware.
                if (c.Id == PciCapabilityId.VendorSpecific && _skipVscCheck && room > 3) Config.CMask.Slice(c.Offset + 3, room - 3).Clear();
                break;
        }
    }

    /// <summary>Refuses an express capability of anything but an endpoint; version 0, a known erratum, becomes 1. The rest stays as the device has it.</summary>
    private void CheckExpress(int at)
    {
        ushort flags = Config.GetUInt16(at);
        int type = flags >> 4 & 0xf;
        if (type is not (0 or 1 or 9)) throw new ArgumentException($"express device type 0x{type:x} cannot be given to a guest");
        if ((flags & 0xf) != 0) return;
        Config.SetUInt16(at, (ushort)(flags | 1));
        _emulated[at] |= 0xf;
    }
}
