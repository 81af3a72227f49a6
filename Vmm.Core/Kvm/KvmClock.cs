using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.VmStates;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// The guest's clock, which the kernel keeps for the whole VM. Guest time goes on while the guest is stopped or moves: wall-clock time that passed between save and start is added once, to the clock and to every TSC alike. BQL held, vCPUs parked.
/// </summary>
internal sealed class KvmClock(KvmVm vm)
{
    /// <summary>More than this is not a downtime but a snapshot of the past: the clock then goes on where it was.</summary>
    internal const ulong MaxDowntimeNs = 60_000_000_000;

    internal static VmStateDescription<KvmClock> Description { get; } = new()
    {
        Name = "kvm-clock",
        Fields = [VmState.UInt64<KvmClock>("clock", static s => ref s.ClockNs), VmState.UInt64<KvmClock>("realtime", static s => ref s.RealtimeNs)],
        PreSave = static s => s.SaveClock(),
        PostLoad = static (s, _) => s._clockLoaded = true,
    };

    internal ulong ClockNs, RealtimeNs;

    private readonly List<(KvmVcpu Vcpu, KvmCpuState State)> _cpus = [], _tscs = [];
    private ulong? _hostTsc;
    private bool _clockLoaded;

    /// <summary>Takes part in the moments at which all TSCs are read and set.</summary>
    internal void Add(KvmVcpu vcpu, KvmCpuState state) => _cpus.Add((vcpu, state));

    internal void SaveClock()
    {
        Moment now = Sample();
        (ClockNs, RealtimeNs, _hostTsc) = (now.ClockNs, now.RealtimeNs, now.HostTsc);
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
        Moment now = Sample();
        ulong away = now.RealtimeNs > RealtimeNs && now.RealtimeNs - RealtimeNs <= MaxDowntimeNs ? now.RealtimeNs - RealtimeNs : 0;
        foreach ((KvmVcpu vcpu, KvmCpuState state) in _tscs)
        {
            ulong tsc = state.Tsc + (ulong)((UInt128)away * state.TscKhz / 1_000_000);
            // An offset is exact; a written value is taken for an attempt at synchronisation when it is near the present one.
            if (now.HostTsc is { } host && TrySetOffset(vcpu, tsc - host)) continue;
            state.TryWriteMsr(KvmCpuState.MsrTsc, tsc);
        }
        _tscs.Clear();
        var clock = new ClockData { Clock = ClockNs + away };
        // The kernel adds what has passed since the sample: without it the clock would be behind the TSCs, and a guest that compares them distrusts both.
        if ((vm.System.Extension(KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME) != 0) (clock.Realtime, clock.Flags) = (now.RealtimeNs, KVM_CLOCK_REALTIME);
        vm.SetClock(clock);
    }

    /// <summary>
    /// The guest's clock, the wall clock and the host's TSC at one moment. A host whose own clock is not the TSC does not tell the last two; they are
    /// read between two readings of the clock then, as near to each other as one of a few attempts brings them.
    /// </summary>
    private Moment Sample()
    {
        const int attempts = 8;
        Moment best = default;
        ulong bestGap = ulong.MaxValue;
        for (int i = 0; i < attempts; i++)
        {
            ClockData before = vm.GetClock();
            if ((before.Flags & KVM_CLOCK_HOST_TSC) != 0) return new Moment(before.Clock, (before.Flags & KVM_CLOCK_REALTIME) != 0 ? before.Realtime : WallClockNs(), before.HostTsc);
            ulong real = WallClockNs(), tsc = 0, offset = 0;
            bool hasTsc = _cpus.Count > 0 && _cpus[0].State.TryReadMsr(KvmCpuState.MsrTsc, out tsc) && TryGetOffset(_cpus[0].Vcpu, out offset);
            ulong gap = vm.GetClock().Clock - before.Clock;
            if (gap >= bestGap) continue;
            (bestGap, best) = (gap, new Moment(before.Clock + (gap / 2), real, hasTsc ? tsc - offset : null));
        }
        return best;
    }

    private readonly record struct Moment(ulong ClockNs, ulong RealtimeNs, ulong? HostTsc);

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
