using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.VmStates;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// What of a VM is in the kernel and not in a vCPU: interrupt controllers, PIT and the guest's clock. Guest time goes on while the guest is stopped
/// or moves: wall-clock time that passed between save and start is added once, to the clock and to every TSC alike. BQL held, vCPUs parked.
/// </summary>
internal sealed class KvmMachineState(KvmVm vm)
{
    /// <summary>More than this is not a downtime but a snapshot of the past: the clock then goes on where it was.</summary>
    internal const ulong MaxDowntimeNs = 60_000_000_000;

    internal static VmStateDescription<KvmMachineState> IrqChipDescription { get; } = new()
    {
        Name = "kvm-irqchip",
        Fields =
        [
            VmState.Buffer<KvmMachineState>("pic_master", IrqChipBytes, static s => s.Chips[0]),
            VmState.Buffer<KvmMachineState>("pic_slave", IrqChipBytes, static s => s.Chips[1]),
            VmState.Buffer<KvmMachineState>("ioapic", IrqChipBytes, static s => s.Chips[2]),
            VmState.Buffer<KvmMachineState>("pit", PitState2Bytes, static s => s.Pit),
        ],
        PreSave = static s => s.SaveChips(),
        PostLoad = static (s, _) => s.LoadChips(),
    };

    internal static VmStateDescription<KvmMachineState> ClockDescription { get; } = new()
    {
        Name = "kvm-clock",
        Fields = [VmState.UInt64<KvmMachineState>("clock", static s => ref s.ClockNs), VmState.UInt64<KvmMachineState>("realtime", static s => ref s.RealtimeNs)],
        PreSave = static s => s.SaveClock(),
        PostLoad = static (s, _) => s._clockLoaded = true,
    };

    internal readonly byte[][] Chips = [new byte[IrqChipBytes], new byte[IrqChipBytes], new byte[IrqChipBytes]];
    internal readonly byte[] Pit = new byte[PitState2Bytes];
    internal ulong ClockNs, RealtimeNs;

    private readonly List<(KvmVcpu Vcpu, KvmCpuState State)> _tscs = [];
    private ulong? _hostTsc;
    private bool _clockLoaded;

    internal void SaveChips()
    {
        for (uint i = 0; i < Chips.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(Chips[i], i);
            vm.Set(KVM_GET_IRQCHIP, Chips[i], "KVM_GET_IRQCHIP");
        }
        vm.Set(KVM_GET_PIT2, Pit, "KVM_GET_PIT2");
    }

    internal void LoadChips()
    {
        for (uint i = 0; i < Chips.Length; i++)
        {
            if (BinaryPrimitives.ReadUInt32LittleEndian(Chips[i]) != i) throw new IncompatibleStateException($"section 'kvm-irqchip': chip {i} has the wrong number");
            vm.Set(KVM_SET_IRQCHIP, Chips[i], "KVM_SET_IRQCHIP");
        }
        vm.Set(KVM_SET_PIT2, Pit, "KVM_SET_PIT2");
    }

    internal void SaveClock()
    {
        ClockData now = vm.GetClock();
        ClockNs = now.Clock;
        RealtimeNs = (now.Flags & KVM_CLOCK_REALTIME) != 0 ? now.Realtime : WallClockNs();
        _hostTsc = (now.Flags & KVM_CLOCK_HOST_TSC) != 0 ? now.HostTsc : null;
    }

    /// <summary>The vCPU's TSC at the moment of <see cref="SaveClock"/>, so that all vCPUs are saved at one moment; null where the kernel cannot tell.</summary>
    internal ulong? TscAtClock(KvmVcpu vcpu) => _hostTsc is { } host && TryGetOffset(vcpu, out ulong offset) ? host + offset : null;

    /// <summary>Notes a TSC that was loaded; it is set when the guest starts.</summary>
    internal void SetTsc(KvmVcpu vcpu, KvmCpuState state)
    {
        _tscs.RemoveAll(t => t.Vcpu == vcpu);
        _tscs.Add((vcpu, state));
    }

    /// <summary>Before the guest starts: brings a loaded clock and the TSCs up to now.</summary>
    internal void StartClock()
    {
        if (!_clockLoaded) return;
        _clockLoaded = false;
        ClockData now = vm.GetClock();
        ulong real = (now.Flags & KVM_CLOCK_REALTIME) != 0 ? now.Realtime : WallClockNs();
        ulong away = real > RealtimeNs && real - RealtimeNs <= MaxDowntimeNs ? real - RealtimeNs : 0;
        foreach ((KvmVcpu vcpu, KvmCpuState state) in _tscs)
        {
            ulong tsc = state.Tsc + (ulong)((UInt128)away * state.TscKhz / 1_000_000);
            // An offset is exact; a written value is taken for an attempt at synchronisation when it is near the present one.
            if ((now.Flags & KVM_CLOCK_HOST_TSC) != 0 && TrySetOffset(vcpu, tsc - now.HostTsc)) continue;
            state.TryWriteMsr(KvmCpuState.MsrTsc, tsc);
        }
        _tscs.Clear();
        var clock = new ClockData { Clock = ClockNs + away };
        // The kernel adds what passes between its reading above and its setting.
        if (away > 0 && (now.Flags & KVM_CLOCK_REALTIME) != 0) clock = new ClockData { Clock = ClockNs, Realtime = RealtimeNs, Flags = KVM_CLOCK_REALTIME };
        vm.SetClock(clock);
    }

    private static ulong WallClockNs() => (ulong)(DateTime.UtcNow - DateTime.UnixEpoch).Ticks * 100;

    private static bool TryGetOffset(KvmVcpu vcpu, out ulong offset) => Offset(vcpu, KVM_GET_DEVICE_ATTR, 0, out offset);

    private static bool TrySetOffset(KvmVcpu vcpu, ulong offset) => Offset(vcpu, KVM_SET_DEVICE_ATTR, offset, out _);

    private static bool Offset(KvmVcpu vcpu, uint request, ulong value, out ulong result)
    {
        var attribute = new DeviceAttr { Group = KVM_VCPU_TSC_CTRL, Attr = KVM_VCPU_TSC_OFFSET };
        Span<byte> word = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(word, value);
        bool ok = Ioctl.Invoke(vcpu.Fd, request, Ioctl.AsBytes(ref attribute), 16, word, out _) >= 0;
        result = BinaryPrimitives.ReadUInt64LittleEndian(word);
        return ok;
    }
}
