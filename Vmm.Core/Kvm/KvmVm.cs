using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// One VM of KVM with in-kernel interrupt controllers and PIT. Memory slots follow the guest's address map. Members are thread-safe where the
/// kernel is; slots and routes change with the BQL held.
/// </summary>
internal sealed partial class KvmVm : IDisposable
{
    /// <summary>Three pages below the BIOS's area that Intel hosts need and no guest RAM covers.</summary>
    private const long TssAddress = 0xfffbd000;
    private const ulong IdentityMapAddress = 0xfffbc000;
    internal const int IrqChipPins = 24;

    private readonly OwnedFd _fd;

    /// <summary>Makes the VM.</summary>
    /// <param name="system">KVM, which must live longer.</param>
    /// <param name="dirtyRingEntries">Entries of each vCPU's dirty ring; 0 for bitmaps.</param>
    /// <exception cref="KvmException">The kernel refused.</exception>
    /// <exception cref="ConfigurationException">The kernel has no such ring.</exception>
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

    /// <summary>Reading the dirty log does not protect pages again; clearing does.</summary>
    internal bool HasManualClear { get; }

    /// <summary>Entries of each vCPU's dirty ring; 0 for bitmaps.</summary>
    internal int DirtyRingEntries { get; private set; }

    /// <summary>A descriptor for a new vCPU.</summary>
    internal OwnedFd CreateVcpu(int index)
    {
        int fd = Ioctl.Invoke(_fd, KVM_CREATE_VCPU, index, out Errno errno);
        return fd >= 0 ? new OwnedFd(fd) : throw KvmSystem.Failed($"KVM_CREATE_VCPU {index}", errno);
    }

    /// <summary>Sets an interrupt line of the in-kernel controllers.</summary>
    internal void SetIrqLine(uint gsi, bool level)
    {
        var line = new IrqLevel { Irq = gsi, Level = level ? 1u : 0 };
        Set(KVM_IRQ_LINE, Ioctl.AsBytes(ref line), $"KVM_IRQ_LINE {gsi}");
    }

    /// <summary>Delivers a message-signalled interrupt.</summary>
    /// <returns>False when no vCPU took it.</returns>
    internal bool SignalMsi(MsiMessage message)
    {
        var msi = new Msi { AddressLo = (uint)message.Address, AddressHi = (uint)(message.Address >> 32), Data = message.Data };
        int result = Ioctl.Invoke(_fd, KVM_SIGNAL_MSI, Ioctl.AsBytes(ref msi), out Errno errno);
        return result >= 0 ? result > 0 : throw KvmSystem.Failed($"KVM_SIGNAL_MSI 0x{message.Address:x}", errno);
    }

    /// <summary>Lets an eventfd raise an interrupt without this process.</summary>
    /// <param name="gsi">Interrupt, a pin or a route of <see cref="SetMsiRoutes"/>.</param>
    /// <param name="trigger">Raises it.</param>
    /// <param name="resample">Is signalled when the guest acknowledges a level; null for an edge.</param>
    /// <returns>Dispose to detach it; both descriptors must stay open until then.</returns>
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

    /// <summary>Lets a guest's write signal an eventfd without an exit.</summary>
    /// <param name="address">Port or guest-physical address.</param>
    /// <param name="size">1, 2, 4 or 8; 0 for any (MMIO only).</param>
    /// <param name="isPort">An I/O port.</param>
    /// <param name="target">Is signalled.</param>
    /// <param name="match">Only writes of this value; null for all.</param>
    /// <returns>Dispose to detach it; the descriptor must stay open until then.</returns>
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

    /// <summary>Replaces the routes: the legacy pins as ever, and a message for each further interrupt number. BQL: held.</summary>
    /// <param name="routes">Message by interrupt number, 24 and up.</param>
    internal void SetMsiRoutes(IReadOnlyDictionary<uint, MsiMessage> routes)
    {
        var entries = new List<IrqRoutingEntry>();
        for (uint pin = 0; pin < IrqChipPins; pin++)
        {
            if (pin < 16) entries.Add(Pin(pin, pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin % 8));
            // The PIT's interrupt 0 is the I/O APIC's pin 2, as on every PC.
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

    /// <summary>The guest's clock, with the host's times of the same moment where the kernel knows them.</summary>
    internal ClockData GetClock()
    {
        var clock = default(ClockData);
        Set(KVM_GET_CLOCK, Ioctl.AsBytes(ref clock), "KVM_GET_CLOCK");
        return clock;
    }

    /// <summary>Sets the guest's clock; with <c>KVM_CLOCK_REALTIME</c> the time since then is added.</summary>
    internal void SetClock(ClockData clock) => Set(KVM_SET_CLOCK, Ioctl.AsBytes(ref clock), "KVM_SET_CLOCK");

    public void Dispose() => _fd.Dispose();

    internal void Set(uint request, Span<byte> argument, string what)
    {
        if (Ioctl.Invoke(_fd, request, argument, out Errno errno) < 0) throw KvmSystem.Failed(what, errno);
    }

    private void EnableDirtyRing(int entries)
    {
        int most = System.Extension(KVM_CAP_DIRTY_LOG_RING) / KvmDirtyRings.EntryBytes;
        if (most == 0) throw new ConfigurationException("the kernel's KVM has no dirty ring") { Hint = "leave out dirty-ring-size" };
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
