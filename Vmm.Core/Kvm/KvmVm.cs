using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// A VM of KVM with in-kernel interrupt controllers and PIT. Memory slots follow the guest's address map. Members are as thread-safe as the kernel's
/// calls; changes of slots and routes need the BQL.
/// </summary>
internal sealed partial class KvmVm : IDisposable
{
    /// <summary>Three pages below the BIOS area, which KVM needs on Intel hosts and no guest RAM covers.</summary>
    private const long TssAddress = 0xfffbd000;
    private const ulong IdentityMapAddress = 0xfffbc000;
    internal const int IrqChipPins = 24;

    private readonly OwnedFd _fd;

    /// <summary>Makes the VM.</summary>
    /// <param name="system">KVM of the host; must outlive the VM.</param>
    /// <param name="dirtyRingEntries">Entries of each vCPU's dirty ring; 0 to use bitmaps.</param>
    /// <exception cref="KvmException">The kernel refused.</exception>
    /// <exception cref="ConfigurationException">The kernel has no dirty ring of this length.</exception>
    internal KvmVm(KvmSystem system, int dirtyRingEntries = 0)
    {
        System = system;
        _fd = system.CreateVm();
        try
        {
            Set(KVM_SET_TSS_ADDR, unchecked((nint)TssAddress), "KVM_SET_TSS_ADDR");
            Span<byte> identity = stackalloc byte[8];
            BinaryPrimitives.WriteUInt64LittleEndian(identity, IdentityMapAddress);
            Set(KVM_SET_IDENTITY_MAP_ADDR, identity, "KVM_SET_IDENTITY_MAP_ADDR");
            if (dirtyRingEntries > 0) EnableDirtyRing(dirtyRingEntries);
            else if ((system.Extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0)
            {
                var enable = new EnableCap { Cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ReservedArgs0 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE };
                Set(KVM_ENABLE_CAP, Ioctl.AsBytes(ref enable), "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
                HasManualClear = true;
            }
            Set(KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP");
            var pit = new PitConfig { Flags = KVM_PIT_SPEAKER_DUMMY };
            Set(KVM_CREATE_PIT2, Ioctl.AsBytes(ref pit), "KVM_CREATE_PIT2");
        }
        catch
        {
            _fd.Dispose();
            throw;
        }
    }

    internal KvmSystem System { get; }

    internal OwnedFd Fd => _fd;

    /// <summary>True if only KVM_CLEAR_DIRTY_LOG, not KVM_GET_DIRTY_LOG, protects pages again.</summary>
    internal bool HasManualClear { get; }

    /// <summary>Entries of each vCPU's dirty ring; 0 if KVM uses bitmaps.</summary>
    internal int DirtyRingEntries { get; private set; }

    /// <summary>Creates a vCPU and returns its descriptor.</summary>
    internal OwnedFd CreateVcpu(int index)
    {
        int fd = Ioctl.Invoke(_fd, KVM_CREATE_VCPU, index, out Errno errno);
        return fd >= 0 ? new OwnedFd(fd) : throw KvmSystem.Failed($"KVM_CREATE_VCPU {index}", errno);
    }

    /// <summary>Sets the level of an input of the in-kernel interrupt controllers.</summary>
    internal void SetIrqLine(uint gsi, bool level)
    {
        var line = new IrqLevel { Irq = gsi, Level = level ? 1u : 0 };
        Set(KVM_IRQ_LINE, Ioctl.AsBytes(ref line), $"KVM_IRQ_LINE {gsi}");
    }

    /// <summary>Delivers a message-signalled interrupt.</summary>
    /// <returns>False if no vCPU took it.</returns>
    internal bool SignalMsi(MsiMessage message)
    {
        var msi = new Msi { AddressLo = (uint)message.Address, AddressHi = (uint)(message.Address >> 32), Data = message.Data };
        int result = Ioctl.Invoke(_fd, KVM_SIGNAL_MSI, Ioctl.AsBytes(ref msi), out Errno errno);
        return result >= 0 ? result > 0 : throw KvmSystem.Failed($"KVM_SIGNAL_MSI 0x{message.Address:x}", errno);
    }

    /// <summary>Attaches an eventfd that raises an interrupt without this process.</summary>
    /// <param name="gsi">Interrupt number: a pin, or a route of <see cref="SetMsiRoutes"/>.</param>
    /// <param name="trigger">A signal on it raises the interrupt.</param>
    /// <param name="resample">KVM signals it when the guest acknowledges a level-triggered interrupt; null for an edge.</param>
    /// <returns>Dispose to detach; both descriptors must stay open until then.</returns>
    internal IDisposable AttachIrqfd(uint gsi, OwnedFd trigger, OwnedFd? resample = null)
    {
        var irqfd = new Irqfd { Fd = (uint)trigger.Number, Gsi = gsi, Flags = resample is null ? 0 : KVM_IRQFD_FLAG_RESAMPLE, Resamplefd = (uint)(resample?.Number ?? 0) };
        Set(KVM_IRQFD, Ioctl.AsBytes(ref irqfd), $"KVM_IRQFD for interrupt {gsi}");
        return new Registration(() =>
        {
            var remove = new Irqfd { Fd = (uint)trigger.Number, Gsi = gsi, Flags = KVM_IRQFD_FLAG_DEASSIGN };
            Set(KVM_IRQFD, Ioctl.AsBytes(ref remove), $"KVM_IRQFD removal for interrupt {gsi}");
        });
    }

    /// <summary>Attaches an eventfd that KVM signals for a guest's write instead of exiting.</summary>
    /// <param name="address">I/O port or guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8 bytes; 0 for any size (MMIO only).</param>
    /// <param name="isPort">True for an I/O port.</param>
    /// <param name="target">The eventfd to signal.</param>
    /// <param name="match">Only writes of this value signal; null for all writes.</param>
    /// <returns>Dispose to detach; the descriptor must stay open until then.</returns>
    internal IDisposable AttachIoeventfd(ulong address, int size, bool isPort, OwnedFd target, ulong? match = null)
    {
        uint flags = (match is null ? 0 : KVM_IOEVENTFD_FLAG_DATAMATCH) | (isPort ? KVM_IOEVENTFD_FLAG_PIO : 0);
        var add = new Ioeventfd { Datamatch = match ?? 0, Addr = address, Len = (uint)size, Fd = target.Number, Flags = flags };
        Set(KVM_IOEVENTFD, Ioctl.AsBytes(ref add), $"KVM_IOEVENTFD at 0x{address:x}");
        return new Registration(() =>
        {
            var remove = add with { Flags = flags | KVM_IOEVENTFD_FLAG_DEASSIGN };
            Set(KVM_IOEVENTFD, Ioctl.AsBytes(ref remove), $"KVM_IOEVENTFD removal at 0x{address:x}");
        });
    }

    /// <summary>Replaces the interrupt routes: the fixed routes of the pins, and one message for each interrupt number after them. BQL: held.</summary>
    /// <param name="routes">Messages by interrupt number, from 24 on.</param>
    internal void SetMsiRoutes(IReadOnlyDictionary<uint, MsiMessage> routes)
    {
        var entries = new List<IrqRoutingEntry>();
        for (uint pin = 0; pin < IrqChipPins; pin++)
        {
            if (pin < 16) entries.Add(Pin(pin, pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin % 8));
            // As on every PC, the PIT's interrupt 0 is connected to pin 2 of the I/O APIC.
            if (pin != 2) entries.Add(Pin(pin, KVM_IRQCHIP_IOAPIC, pin == 0 ? 2 : pin));
        }
        foreach ((uint gsi, MsiMessage m) in routes)
            entries.Add(new IrqRoutingEntry { Gsi = gsi, Type = KVM_IRQ_ROUTING_MSI, ReservedUnion0 = (uint)m.Address, ReservedUnion1 = (uint)(m.Address >> 32), ReservedUnion2 = m.Data });
        IrqRoutingEntry[] all = [.. entries];
        byte[] argument = new byte[8 + all.Length * 48];
        BinaryPrimitives.WriteInt32LittleEndian(argument, all.Length);
        Ioctl.AsBytes<IrqRoutingEntry>(all).CopyTo(argument.AsSpan(8));
        Set(KVM_SET_GSI_ROUTING, argument, "KVM_SET_GSI_ROUTING");

        static IrqRoutingEntry Pin(uint gsi, uint chip, uint pin) => new() { Gsi = gsi, Type = KVM_IRQ_ROUTING_IRQCHIP, ReservedUnion0 = chip, ReservedUnion1 = pin };
    }

    /// <summary>Reads the guest's clock, with the host's times at the same moment if the kernel knows them.</summary>
    internal ClockData GetClock()
    {
        var clock = default(ClockData);
        Set(KVM_GET_CLOCK, Ioctl.AsBytes(ref clock), "KVM_GET_CLOCK");
        return clock;
    }

    /// <summary>Sets the guest's clock; with <c>KVM_CLOCK_REALTIME</c> the kernel adds the time since <c>Realtime</c>.</summary>
    internal void SetClock(ClockData clock) => Set(KVM_SET_CLOCK, Ioctl.AsBytes(ref clock), "KVM_SET_CLOCK");

    public void Dispose() => _fd.Dispose();

    internal void Set(uint request, Span<byte> argument, string what)
    {
        if (Ioctl.Invoke(_fd, request, argument, out Errno errno) < 0) throw KvmSystem.Failed(what, errno);
    }

    private void EnableDirtyRing(int entries)
    {
        int most = System.Extension(KVM_CAP_DIRTY_LOG_RING) / KvmDirtyRings.EntryBytes;
        if (most == 0) throw new ConfigurationException("the kernel's KVM has no dirty ring") { Hint = "remove the option dirty-ring-size" };
        if (entries < KvmDirtyRings.MinEntries || entries > most || (entries & (entries - 1)) != 0)
            throw new ConfigurationException($"a dirty ring of {entries} entries: expected a power of two from {KvmDirtyRings.MinEntries} to {most}");
        var enable = new EnableCap { Cap = KVM_CAP_DIRTY_LOG_RING, ReservedArgs0 = (ulong)entries * KvmDirtyRings.EntryBytes };
        Set(KVM_ENABLE_CAP, Ioctl.AsBytes(ref enable), "KVM_CAP_DIRTY_LOG_RING");
        DirtyRingEntries = entries;
    }

    private void Set(uint request, nint value, string what)
    {
        if (Ioctl.Invoke(_fd, request, value, out Errno errno) < 0) throw KvmSystem.Failed(what, errno);
    }
}
