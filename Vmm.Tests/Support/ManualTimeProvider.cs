namespace Vmm.Tests.Support;

/// <summary>Time that only <see cref="Advance"/> moves. Due timers run on the thread that calls it. As in .NET, a timer drops what is less than a millisecond.</summary>
internal sealed class ManualTimeProvider : TimeProvider
{
    private readonly List<ManualTimer> _timers = [];
    private long _now;

    public override long TimestampFrequency => TimeSpan.TicksPerSecond;

    public override long GetTimestamp() => _now;

    public override DateTimeOffset GetUtcNow() => UtcStart + TimeSpan.FromTicks(_now);

    /// <summary>The UTC time at the start.</summary>
    public DateTimeOffset UtcStart { get; init; } = DateTimeOffset.UnixEpoch;

    public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
    {
        var timer = new ManualTimer(this, () => callback(state));
        timer.Change(dueTime, period);
        _timers.Add(timer);
        return timer;
    }

    /// <summary>Count of timers that were created and not disposed.</summary>
    public int TimerCount => _timers.Count;

    /// <summary>Count of timers that will fire.</summary>
    public int DueCount => _timers.Count(static t => t.Due is not null);

    public void Advance(TimeSpan by)
    {
        long end = _now + by.Ticks;
        while (_timers.Where(t => t.Due <= end).MinBy(static t => t.Due) is { } next)
        {
            _now = Math.Max(_now, next.Due!.Value);
            next.Due = null;
            next.Fire();
        }
        _now = end;
    }

    private sealed class ManualTimer(ManualTimeProvider owner, Action fire) : ITimer
    {
        public long? Due { get; set; }

        public void Fire() => fire();

        public bool Change(TimeSpan dueTime, TimeSpan period)
        {
            Due = dueTime == Timeout.InfiniteTimeSpan ? null : owner._now + (dueTime.Ticks / TimeSpan.TicksPerMillisecond * TimeSpan.TicksPerMillisecond);
            return true;
        }

        public void Dispose() => owner._timers.Remove(this);

        public ValueTask DisposeAsync()
        {
            Dispose();
            return ValueTask.CompletedTask;
        }
    }
}
