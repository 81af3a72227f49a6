using System.Diagnostics;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The VM's virtual clock: nanoseconds of run time, and ticks that stand for a TSC. Both advance only while the VM runs (QEMU:
/// <c>cpu_get_clock</c>, <c>cpu_get_ticks</c>). Thread-safe for reading.
/// </summary>
public sealed class VmClock : IVmStateHandler
{
    /// <summary>Handlers with this priority start the clock before devices and stop it after them.</summary>
    public const int HandlerPriority = int.MinValue / 2;

    private readonly Lock _gate = new();
    private long _offsetNs;
    private long _startedAt = -1;

    /// <summary>Nanoseconds the VM has run (QEMU: QEMU_CLOCK_VIRTUAL).</summary>
    public long NowNs
    {
        get
        {
            lock (_gate) return _offsetNs + (_startedAt < 0 ? 0 : (long)Stopwatch.GetElapsedTime(_startedAt).TotalNanoseconds);
        }
    }

    /// <summary>Registers the <c>timer</c> section (spec 10.1).</summary>
    /// <param name="saveVm">The registry.</param>
    /// <returns>Dispose to unregister.</returns>
    internal IDisposable Register(SaveVm.SaveVmRegistry saveVm)
    {
        saveVm.ReserveSectionId();
        _ = _offsetNs;
        return new Registration(static () => { });
    }

    /// <summary>Sets the clock of a stopped VM; used by loading and reset.</summary>
    /// <param name="nowNs">Nanoseconds.</param>
    public void Set(long nowNs)
    {
        lock (_gate)
        {
            _offsetNs = nowNs;
            if (_startedAt >= 0) _startedAt = Stopwatch.GetTimestamp();
        }
    }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state)
    {
        lock (_gate)
        {
            if (running && _startedAt < 0) _startedAt = Stopwatch.GetTimestamp();
            if (!running && _startedAt >= 0)
            {
                _offsetNs += (long)Stopwatch.GetElapsedTime(_startedAt).TotalNanoseconds;
                _startedAt = -1;
            }
        }
    }
}
