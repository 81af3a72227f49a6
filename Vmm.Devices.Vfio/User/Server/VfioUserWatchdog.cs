using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// Ends a client's connection when the client misses a deadline of <see cref="VfioUserDeadlines"/>: a VERSION that does not come, a message without
/// its end, a reply that is not taken. A timer looks, because the session's threads block in the kernel. Thread-safe.
/// </summary>
internal sealed class VfioUserWatchdog : IDisposable
{
    private const int Waiting = 0, Greeted = 1, Missed = 2;

    private readonly VfioUserSocket _socket;
    private readonly long _start = Environment.TickCount64;
    private readonly long _greetingMs, _stallMs;
    private readonly Timer _timer;
    private volatile VfioUserSocket? _twin;
    private volatile string? _reason;
    private int _state;

    /// <param name="socket">The connection; not owned.</param>
    /// <param name="greeting">From now to the call of <see cref="TryGreet"/>.</param>
    /// <param name="stall">Of a message under way, without a byte.</param>
    internal VfioUserWatchdog(VfioUserSocket socket, TimeSpan greeting, TimeSpan stall)
    {
        (_socket, _greetingMs, _stallMs) = (socket, (long)greeting.TotalMilliseconds, (long)stall.TotalMilliseconds);
        long period = Math.Clamp(Math.Min(_greetingMs, _stallMs) / 4, 10, 1000);
        _timer = new Timer(static self => ((VfioUserWatchdog)self!).Look(), this, period, period);
    }

    /// <summary>Why the connection was ended; null if it was not.</summary>
    internal string? Reason => _reason;

    /// <summary>Watches the second socket too.</summary>
    internal void AddTwin(VfioUserSocket twin) => _twin = twin;

    /// <summary>Notes that VERSION has come. False when it was too late.</summary>
    internal bool TryGreet() => Interlocked.CompareExchange(ref _state, Greeted, Waiting) == Waiting;

    /// <summary>Waits for a look that is under way; the sockets may be closed afterwards.</summary>
    public void Dispose()
    {
        using var idle = new ManualResetEvent(false);
        if (_timer.Dispose(idle)) idle.WaitOne();
    }

    private void Look()
    {
        if (_reason is not null) return;
        if (Environment.TickCount64 - _start >= _greetingMs && Interlocked.CompareExchange(ref _state, Missed, Waiting) == Waiting) End($"no VERSION in {_greetingMs} ms");
        else if (_socket.StalledMs >= _stallMs || _twin?.StalledMs >= _stallMs) End($"a message has stood still for {_stallMs} ms");
    }

    private void End(string reason)
    {
        _reason = reason;
        _socket.Shutdown();
        _twin?.Shutdown();
    }
}
