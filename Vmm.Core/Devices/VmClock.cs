using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The VM's virtual clock: nanoseconds of run time, and ticks in the place of a TSC. Both advance only while the VM runs (QEMU:
/// <c>cpu_get_clock</c>, <c>cpu_get_ticks</c>). Reads are thread-safe; changes and timers need the BQL.
/// </summary>
/// <param name="bql">Lock for timer callbacks; null if the clock belongs to no VM.</param>
/// <param name="time">Source of time; null for the system's clock.</param>
public sealed class VmClock(Bql? bql = null, TimeProvider? time = null) : IVmStateHandler
{
    /// <summary>Handlers with this priority start the clock before devices and stop it after them.</summary>
    public const int HandlerPriority = int.MinValue / 2;

    /// <summary>Rate of <see cref="NowTicks"/>. No device here needs the rate of a real TSC; a peer continues from the value.</summary>
    public const long TicksPerSecond = 1_000_000_000;

    private const int NsPerTick = (int)(1_000_000_000 / TicksPerSecond);

    /// <summary>The <c>timer</c> section (QEMU: <c>vmstate_timers</c>; stream 10.1).</summary>
    public static VmStateDescription<VmClock> Description { get; } = new()
    {
        Name = "timer",
        VersionId = 2,
        MinimumVersionId = 1,
        Fields =
        [
            VmState.Int64<VmClock>("cpu_ticks_offset", static c => ref c._offsetTicks),
            VmState.Unused<VmClock>(8),
            VmState.Int64<VmClock>("cpu_clock_offset", static c => ref c._offsetNs, since: 2),
        ],
        PreSave = static c => c.Fold(),
        PreLoad = static c => c.Fold(),
    };

    private readonly TimeProvider _time = time ?? TimeProvider.System;
    private readonly Lock _gate = new();
    private readonly List<VmTimer> _timers = [];
    private long _offsetTicks;
    private long _offsetNs;
    private long? _startedAt;

    /// <summary>Run time of the VM, ns (QEMU: QEMU_CLOCK_VIRTUAL).</summary>
    public long NowNs
    {
        get
        {
            lock (_gate) return _offsetNs + ElapsedNs();
        }
    }

    /// <summary>Run time of the VM in ticks of <see cref="TicksPerSecond"/>.</summary>
    public long NowTicks
    {
        get
        {
            lock (_gate) return _offsetTicks + ElapsedNs() / NsPerTick;
        }
    }

    internal Bql Bql { get; } = bql ?? new Bql();

    internal TimeProvider Time => _time;

    internal bool IsRunning
    {
        get
        {
            lock (_gate) return _startedAt is not null;
        }
    }

    /// <summary>Makes a timer that is not pending. BQL: held.</summary>
    /// <param name="callback">Called with the BQL held, only while the VM runs.</param>
    /// <returns>The timer; the caller disposes it.</returns>
    public VmTimer CreateTimer(Action callback)
    {
        ArgumentNullException.ThrowIfNull(callback);
        var timer = new VmTimer(this, callback);
        lock (_gate) _timers.Add(timer);
        return timer;
    }

    /// <summary>Sets clock and ticks to the given run time, ns. BQL: held.</summary>
    public void Set(long nowNs)
    {
        lock (_gate)
        {
            _offsetNs = nowNs;
            _offsetTicks = nowNs / NsPerTick;
            if (_startedAt is not null) _startedAt = _time.GetTimestamp();
        }
        ArmTimers();
    }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state)
    {
        Fold();
        lock (_gate) _startedAt = running ? _startedAt ?? _time.GetTimestamp() : null;
        ArmTimers();
    }

    /// <summary>Registers the <c>timer</c> section.</summary>
    /// <returns>Dispose to unregister.</returns>
    internal IDisposable Register(SaveVmRegistry saveVm) => saveVm.RegisterVmState(Description, this, instanceId: 0);

    internal void Forget(VmTimer timer)
    {
        lock (_gate) _timers.Remove(timer);
    }

    /// <summary>Adds the elapsed time to the offsets, so that the fields hold the present time.</summary>
    private void Fold()
    {
        lock (_gate)
        {
            long elapsed = ElapsedNs();
            _offsetNs += elapsed;
            _offsetTicks += elapsed / NsPerTick;
            if (_startedAt is not null) _startedAt = _time.GetTimestamp();
        }
    }

    /// <summary>Arms all timers, including those whose expiry a load has changed.</summary>
    private void ArmTimers()
    {
        VmTimer[] timers;
        lock (_gate) timers = [.. _timers];
        foreach (VmTimer timer in timers) timer.Arm();
    }

    private long ElapsedNs() => _startedAt is { } at ? _time.GetElapsedTime(at).Ticks * TimeSpan.NanosecondsPerTick : 0;
}
