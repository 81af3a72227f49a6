using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Threading;
using Vmm.Core.VmStates;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>The kernel's interrupt controllers and timer, saved in QEMU's sections. BQL held, vCPUs parked.</summary>
internal sealed class KvmIrqChips(KvmVm vm, VmClock clock)
{
    internal KvmPic Master { get; } = new(vm, 0);

    internal KvmPic Slave { get; } = new(vm, 1);

    internal KvmIoApic IoApic { get; } = new(vm);

    internal KvmPit Pit { get; } = new(vm, clock);

    /// <summary>The kernel's structures as last read or written, in the order of the properties.</summary>
    internal IReadOnlyList<byte[]> Raw => [Master.Raw, Slave.Raw, IoApic.Raw, Pit.Raw];

    /// <summary>Registers a section for each chip; QEMU's <c>i8259</c> appears twice.</summary>
    internal IEnumerable<IDisposable> Register(IDeviceServices services) =>
    [
        services.RegisterVmState(KvmPic.Description, Master, 0), services.RegisterVmState(KvmPic.Description, Slave, 1),
        services.RegisterVmState(KvmIoApic.Description, IoApic, 0), services.RegisterVmState(KvmPit.Description, Pit, 0),
    ];

    /// <summary>Reads the state of all chips from the kernel.</summary>
    internal void Get()
    {
        Master.Get();
        Slave.Get();
        IoApic.Get();
        Pit.Get();
    }

    /// <summary>Writes the state of all chips to the kernel.</summary>
    internal void Set()
    {
        Master.Set();
        Slave.Set();
        IoApic.Set();
        Pit.Set();
    }
}

/// <summary>One of the two 8259s (QEMU: <c>vmstate_pic_common</c>, <c>kvm_pic_get</c>, <c>kvm_pic_put</c>).</summary>
internal sealed class KvmPic(KvmVm vm, uint chip)
{
    private const int Head = 8, Elcr = 14;

    internal static VmStateDescription<KvmPic> Description { get; } = new()
    {
        Name = "i8259",
        Fields =
        [
            Register("last_irr", 0), Register("irr", 1), Register("imr", 2), Register("isr", 3), Register("priority_add", 4), Register("irq_base", 5),
            Register("read_reg_select", 6), Register("poll", 7), Register("special_mask", 8), Register("init_state", 9), Register("auto_eoi", 10),
            Register("rotate_on_auto_eoi", 11), Register("special_fully_nested_mode", 12), Register("init4", 13),
            VmState.UInt8<KvmPic>("single_mode", static p => ref p._singleMode), Register("elcr", Elcr),
        ],
        PreSave = static p => p.Get(),
        PreLoad = static p => p.Get(),
        PostLoad = static (p, _) => p.Set(),
    };

    private byte _singleMode; // The kernel has no such field; a peer's value is kept and sent again.

    internal byte[] Raw { get; } = new byte[IrqChipBytes];

    internal void Get()
    {
        BinaryPrimitives.WriteUInt32LittleEndian(Raw, chip);
        vm.Set(KVM_GET_IRQCHIP, Raw, "KVM_GET_IRQCHIP");
    }

    internal void Set() => vm.Set(KVM_SET_IRQCHIP, Raw, "KVM_SET_IRQCHIP");

    private static VmStateField<KvmPic> Register(string name, int at) => VmState.UInt8<KvmPic>(name, p => ref p.Raw[Head + at]);
}

/// <summary>The I/O APIC (QEMU: <c>vmstate_ioapic_common</c>, <c>kvm_ioapic_get</c>, <c>kvm_ioapic_put</c>). The machine fixes its address.</summary>
internal sealed class KvmIoApic(KvmVm vm)
{
    private const uint Chip = 2;
    private const int Pins = 24, SelectAt = 16, IdAt = 20, IrrAt = 24, TableAt = 32;

    internal static VmStateDescription<KvmIoApic> Description { get; } = new()
    {
        Name = "ioapic", VersionId = 3, MinimumVersionId = 1,
        Fields =
        [
            VmState.UInt8<KvmIoApic>("id", static a => ref a._id), VmState.UInt8<KvmIoApic>("ioregsel", static a => ref a._select),
            VmState.Unused<KvmIoApic>(8, since: 2), VmState.UInt32<KvmIoApic>("irr", static a => ref a._irr, since: 2),
            VmState.Array<KvmIoApic, ulong>("ioredtbl", VmStateTypes.UInt64, Pins, static a => a._table),
        ],
        PreSave = static a => a.Get(),
        PreLoad = static a => a.Get(),
        PostLoad = static (a, _) => a.AfterLoad(),
    };

    private readonly ulong[] _table = new ulong[Pins];
    private byte _id, _select;
    private uint _irr;

    internal byte[] Raw { get; } = new byte[IrqChipBytes];

    internal void Get()
    {
        BinaryPrimitives.WriteUInt32LittleEndian(Raw, Chip);
        vm.Set(KVM_GET_IRQCHIP, Raw, "KVM_GET_IRQCHIP");
        (_select, _id, _irr) = (Raw[SelectAt], Raw[IdAt], BinaryPrimitives.ReadUInt32LittleEndian(Raw.AsSpan(IrrAt)));
        for (int i = 0; i < Pins; i++) _table[i] = BinaryPrimitives.ReadUInt64LittleEndian(Raw.AsSpan(TableAt + (i * 8)));
    }

    internal void Set() => vm.Set(KVM_SET_IRQCHIP, Raw, "KVM_SET_IRQCHIP");

    private void AfterLoad()
    {
        (Raw[SelectAt], Raw[IdAt]) = (_select, _id);
        BinaryPrimitives.WriteUInt32LittleEndian(Raw.AsSpan(IrrAt), _irr);
        for (int i = 0; i < Pins; i++) BinaryPrimitives.WriteUInt64LittleEndian(Raw.AsSpan(TableAt + (i * 8)), _table[i]);
        Set();
    }
}

/// <summary>
/// The 8254 (QEMU: <c>vmstate_pit_common</c>, <c>kvm_pit_get</c>, <c>kvm_pit_put</c>). The stream has times of the VM's clock, the kernel times of the
/// host's monotonic clock; the kernel restarts a count when it is set.
/// </summary>
internal sealed class KvmPit(KvmVm vm, VmClock clock)
{
    private const int FlagsAt = 72, ChannelBytes = 24, CrystalHz = 1193182;
    private const uint HpetLegacy = 1, SpeakerDataOn = 2;

    internal static VmStateDescription<KvmPit> Description { get; } = new()
    {
        Name = "i8254", VersionId = 3, MinimumVersionId = 2,
        Fields =
        [
            VmState.UInt32<KvmPit>("channels[0].irq_disabled", static p => ref p._irqDisabled, since: 3),
            VmState.StructArray<KvmPit, Channel>("channels", Channel.Description, 3, static p => p._channels, since: 2),
            VmState.Int64<KvmPit>("channels[0].next_transition_time", static p => ref p._channels[0].NextTransitionNs),
        ],
        Subsections =
        [
            new VmStateDescription<KvmPit>
            {
                Name = "i8254/kvm-speaker", Needed = static p => p._speakerDataOn != 0, Fields = [VmState.UInt8<KvmPit>("data_on", static p => ref p._speakerDataOn)],
            },
        ],
        PreSave = static p => p.Get(),
        PreLoad = static p => p._speakerDataOn = 0,
        PostLoad = static (p, _) => p.AfterLoad(),
    };

    private readonly Channel[] _channels = [new(), new(), new()];
    private uint _irqDisabled;
    private byte _speakerDataOn;
    private long _clockAheadNs;

    internal byte[] Raw { get; } = new byte[PitState2Bytes];

    /// <summary>Keeps the difference between the VM's clock and the host's. Call it at a stop, before the VM's clock stops.</summary>
    internal void NoteClock() => _clockAheadNs = clock.NowNs - MonotonicClock.NowNs;

    internal void Get()
    {
        vm.Set(KVM_GET_PIT2, Raw, "KVM_GET_PIT2");
        uint flags = BinaryPrimitives.ReadUInt32LittleEndian(Raw.AsSpan(FlagsAt));
        (_irqDisabled, _speakerDataOn) = (flags & HpetLegacy, (byte)((flags & SpeakerDataOn) != 0 ? 1 : 0));
        for (int i = 0; i < _channels.Length; i++) _channels[i].Take(Raw.AsSpan(i * ChannelBytes), _clockAheadNs);
    }

    internal void Set() => vm.Set(KVM_SET_PIT2, Raw, "KVM_SET_PIT2");

    private void AfterLoad()
    {
        BinaryPrimitives.WriteUInt32LittleEndian(Raw.AsSpan(FlagsAt), (_irqDisabled != 0 ? HpetLegacy : 0) | (_speakerDataOn != 0 ? SpeakerDataOn : 0));
        for (int i = 0; i < _channels.Length; i++) _channels[i].Give(Raw.AsSpan(i * ChannelBytes), _clockAheadNs);
        Set();
    }

    private sealed class Channel
    {
        private const int Latched = 4, Registers = 6, RegisterCount = 10, Mode = 7, LoadTime = 16;

        internal static VmStateDescription<Channel> Description { get; } = new()
        {
            Name = "pit channel", VersionId = 2, MinimumVersionId = 2,
            Fields =
            [
                VmState.Int32<Channel>("count", static c => ref c._count), VmState.UInt16<Channel>("latched_count", static c => ref c._latchedCount),
                Register("count_latched", 0), Register("status_latched", 1), Register("status", 2), Register("read_state", 3), Register("write_state", 4),
                Register("write_latch", 5), Register("rw_mode", 6), Register("mode", Mode), Register("bcd", 8), Register("gate", 9),
                VmState.Int64<Channel>("count_load_time", static c => ref c._loadedNs), VmState.Int64<Channel>("next_transition_time", static c => ref c.NextTransitionNs),
            ],
        };

        internal long NextTransitionNs;
        private readonly byte[] _registers = new byte[RegisterCount];
        private int _count;
        private ushort _latchedCount;
        private long _loadedNs;

        internal void Take(ReadOnlySpan<byte> raw, long aheadNs)
        {
            (_count, _latchedCount) = (BinaryPrimitives.ReadInt32LittleEndian(raw), BinaryPrimitives.ReadUInt16LittleEndian(raw[Latched..]));
            raw.Slice(Registers, RegisterCount).CopyTo(_registers);
            _loadedNs = BinaryPrimitives.ReadInt64LittleEndian(raw[LoadTime..]) + aheadNs;
            // Time at which the output first changes after the count was loaded (QEMU: pit_get_next_transition_time).
            long ticks = _registers[Mode] switch { 2 => _count + 1L, 3 => (_count + 1L) / 2, _ => _count };
            NextTransitionNs = _loadedNs + (ticks * 1_000_000_000 / CrystalHz);
        }

        internal void Give(Span<byte> raw, long aheadNs)
        {
            BinaryPrimitives.WriteInt32LittleEndian(raw, _count);
            BinaryPrimitives.WriteUInt16LittleEndian(raw[Latched..], _latchedCount);
            _registers.CopyTo(raw[Registers..]);
            BinaryPrimitives.WriteInt64LittleEndian(raw[LoadTime..], _loadedNs - aheadNs);
        }

        private static VmStateField<Channel> Register(string name, int at) => VmState.UInt8<Channel>(name, c => ref c._registers[at]);
    }
}
