namespace Vmm.Core.SaveVm;

/// <summary>Bytes that are still to be sent (QEMU: <c>state_pending_estimate</c>, <c>state_pending_exact</c>).</summary>
/// <param name="PrecopyBytes">Bytes that can be sent while the VM runs.</param>
/// <param name="StopCopyBytes">Bytes that can only be sent after the VM has stopped.</param>
/// <param name="PostcopyBytes">Bytes that could also be sent after the destination runs.</param>
public readonly record struct PendingBytes(long PrecopyBytes, long StopCopyBytes = 0, long PostcopyBytes = 0)
{
    /// <summary>The sum: everything that must be sent before the destination can run, unless postcopy is used.</summary>
    public long TotalBytes => PrecopyBytes + StopCopyBytes + PostcopyBytes;

    /// <summary>Adds member by member.</summary>
    public static PendingBytes operator +(PendingBytes a, PendingBytes b) =>
        new(a.PrecopyBytes + b.PrecopyBytes, a.StopCopyBytes + b.StopCopyBytes, a.PostcopyBytes + b.PostcopyBytes);

    /// <summary>Adds member by member.</summary>
    public PendingBytes Add(PendingBytes other) => this + other;
}

/// <summary>How an iteration ended.</summary>
public enum SaveProgress
{
    /// <summary>The budget ran out; there is more to send.</summary>
    More,
    /// <summary>Nothing is left to send until something becomes dirty.</summary>
    Done,
}

/// <summary>How much one iteration may send (QEMU: <c>migration_rate_exceeded</c> and the 50 ms slice of <c>ram_save_iterate</c>). Immutable.</summary>
public sealed class IterateBudget
{
    private readonly long _limitPosition;
    private readonly long _deadline;
    private readonly CancellationToken _cancel;

    /// <summary>Makes a budget that ends at a stream offset (<see cref="long.MaxValue"/> for none), after a time, or when cancelled.</summary>
    public IterateBudget(long limitPosition, TimeSpan duration, CancellationToken cancel)
    {
        _limitPosition = limitPosition;
        _deadline = Environment.TickCount64 + (long)duration.TotalMilliseconds;
        _cancel = cancel;
    }

    /// <summary>An unlimited budget.</summary>
    public static IterateBudget Unlimited { get; } = new(long.MaxValue, TimeSpan.FromDays(1000), CancellationToken.None);

    /// <summary>True when the iteration should end after the current record. Reads the clock, so ask once in some dozens of pages.</summary>
    /// <param name="position">Current stream offset.</param>
    public bool IsExhausted(long position) => position >= _limitPosition || _cancel.IsCancellationRequested || Environment.TickCount64 >= _deadline;

    /// <summary>True when the byte limit is reached; cheap enough for every page.</summary>
    /// <param name="position">Current stream offset.</param>
    public bool IsOverBytes(long position) => position >= _limitPosition;
}
