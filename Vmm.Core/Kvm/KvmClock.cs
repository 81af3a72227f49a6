using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.VmStates;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// The guest's clock, which the kernel keeps for the whole VM. Guest time goes on while the guest is stopped or moves: the start adds the wall-clock
/// time since the save to the clock and to every TSC alike. BQL held, vCPUs parked.
/// </summary>
internal sealed class KvmClock(KvmVm vm)
{
    /// <summary>Longest downtime that is added. A longer time means a snapshot of the past, whose clock goes on from the saved value.</summary>
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

    /// <summary>Adds a vCPU to those whose TSCs are read and set together.</summary>
    internal void Add(KvmVcpu vcpu, KvmCpuState state) => _cpus.Add((vcpu, state));

    internal void SaveClock()
    {
        Moment now = Sample();
        (ClockNs, RealtimeNs, _hostTsc) = (now.ClockNs, now.RealtimeNs, now.HostTsc);
    }

    /// <summary>
    /// The vCPU's TSC at the time of <see cref="SaveClock"/>, so that the TSCs of all vCPUs belong to one time; null if the kernel cannot tell.
    /// </summary>
    internal ulong? TscAtClock(KvmVcpu vcpu) => _hostTsc is { } host && TryGetOffset(vcpu, out ulong offset) ? host + offset : null;

    /// <summary>Keeps a loaded TSC until the guest starts.</summary>
    internal void SetTsc(KvmVcpu vcpu, KvmCpuState state)
    {
        _tscs.RemoveAll(t => t.Vcpu == vcpu);
        _tscs.Add((vcpu, state));
    }

    /// <summary>Advances a loaded clock and the TSCs to the present time, before the guest starts.</summary>
    internal void StartClock()
    {
        if (!_clockLoaded) return;
        _clockLoaded = false;
        Moment now = Sample();
        ulong away = now.RealtimeNs > RealtimeNs && now.RealtimeNs - RealtimeNs <= MaxDowntimeNs ? now.RealtimeNs - RealtimeNs : 0;
        foreach ((KvmVcpu vcpu, KvmCpuState state) in _tscs)
        {
            ulong tsc = state.Tsc + (ulong)((UInt128)away * state.TscKhz / 1_000_000);
            // An offset is exact. The kernel takes a written TSC near the present one for an attempt to synchronise TSCs, and changes it.
            if (now.HostTsc is { } host && TrySetOffset(vcpu, tsc - host)) continue;
            state.TryWriteMsr(KvmCpuState.MsrTsc, tsc);
        }
        _tscs.Clear();
        var clock = new ClockData { Clock = ClockNs + away };
        // The kernel adds the time since the sample. Otherwise the clock would lag behind the TSCs, and a guest that compares them trusts neither.
        if ((vm.System.Extension(KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME) != 0) (clock.Realtime, clock.Flags) = (now.RealtimeNs, KVM_CLOCK_REALTIME);
        vm.SetClock(clock);
    }

    /// <summary>
    /// Reads the guest's clock, the wall clock and the host's TSC at one time. If the host's own clock is not the TSC, the kernel does not tell the last
    /// two; then this method reads them between two readings of the guest's clock, and keeps the attempt with the shortest gap.
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
