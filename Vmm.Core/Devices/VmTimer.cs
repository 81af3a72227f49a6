namespace Vmm.Core.Devices;

/// <summary>
/// A timer on a VM's virtual clock; fires once, and only while the VM runs. All members need the BQL; the callback holds it. The expiry is device
/// state; declare it with <c>VmState.Timer(name, static d =&gt; ref d._timer.ExpiryNs)</c> (QEMU: <c>QEMUTimer</c>).
/// </summary>
public sealed class VmTimer : IDisposable
{
    /// <summary>Longest wait of the host's timer; a later expiry waits several times.</summary>
    private static readonly TimeSpan s_longestWait = TimeSpan.FromHours(1);

    private readonly VmClock _clock;
    private readonly Action _callback;
    private readonly ITimer _host;
    private long _expiryNs = -1;
    private bool _disposed;

    internal VmTimer(VmClock clock, Action callback)
    {
        _clock = clock;
        _callback = callback;
        _host = clock.Time.CreateTimer(static t => ((VmTimer)t!).OnHostTimer(), this, Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
    }

    /// <summary>
    /// Expiry in ns of the virtual clock; -1 if the timer is not pending. Only a load writes it; all others use <see cref="Mod"/> and <see cref="Del"/>.
    /// </summary>
    public ref long ExpiryNs => ref _expiryNs;

    /// <summary>True if the timer is pending (QEMU: <c>timer_pending</c>).</summary>
    public bool IsPending => _expiryNs >= 0;

    /// <summary>Sets the expiry (QEMU: <c>timer_mod_ns</c>).</summary>
    /// <param name="expiryNs">Virtual time, ns; a time in the past fires at once.</param>
    public void Mod(long expiryNs)
    {
        _expiryNs = Math.Max(expiryNs, 0);
        Arm();
    }

    /// <summary>Cancels the timer (QEMU: <c>timer_del</c>).</summary>
    public void Del()
    {
        _expiryNs = -1;
        Arm();
    }

    /// <summary>Cancels the timer for good; no callback starts afterwards.</summary>
    public void Dispose()
    {
        _disposed = true;
        _expiryNs = -1;
        _clock.Forget(this);
        _host.Dispose();
    }

    internal void Arm()
    {
        if (_disposed) return;
        TimeSpan due = Timeout.InfiniteTimeSpan;
        if (IsPending && _clock.IsRunning)
        {
            long leftNs = Math.Max(_expiryNs - _clock.NowNs, 0);
            // Host timers count whole milliseconds; rounding down would fire early and arm again at once, many times.
            due = TimeSpan.FromMilliseconds(Math.Min(Math.Ceiling(leftNs / 1e6), s_longestWait.TotalMilliseconds));
        }
        _host.Change(due, Timeout.InfiniteTimeSpan);
    }

    private void OnHostTimer()
    {
        using (_clock.Bql.Acquire())
        {
            // While this thread waited for the lock, the VM may have stopped or the timer may have changed.
            if (_disposed || !IsPending || !_clock.IsRunning) return;
            if (_clock.NowNs < _expiryNs)
            {
                Arm();
                return;
            }
            _expiryNs = -1;
            _callback();
        }
    }
}
