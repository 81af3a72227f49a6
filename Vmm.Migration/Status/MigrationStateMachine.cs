using static Vmm.Migration.Status.MigrationStatus;

namespace Vmm.Migration.Status;

/// <summary>
/// Legal moves between statuses as data (stream 11.1, 11.2) and the present one. <see cref="TryMove"/> answers; callers must use the answer.
/// Thread-safe (QEMU: <c>migrate_set_state</c>).
/// </summary>
internal sealed class MigrationStateMachine
{
    /// <summary>Every legal move. The destination shares the table; it also goes from a terminal state back to setup for another attempt.</summary>
    public static IReadOnlyList<(MigrationStatus From, MigrationStatus[] To)> Table { get; } =
    [
        (None, [Setup]),
        (Setup, [Active, Failing, Cancelling]),
        (Active, [PreSwitchover, Device, Completed, Failing, Cancelling]),
        (PreSwitchover, [Device, Failing, Cancelling]),
        (Device, [Completed, Failing, Cancelling]),
        (Failing, [Failed]),
        (Cancelling, [Cancelled, Completed, Failed]),
        (Failed, [Setup]),
        (Cancelled, [Setup]),
        (Completed, [Setup]),
    ];

    private static readonly HashSet<(MigrationStatus, MigrationStatus)> s_legal = [.. Table.SelectMany(static r => r.To.Select(to => (r.From, to)))];

    private readonly Lock _gate = new();
    private MigrationStatus _status;

    /// <summary>The present status.</summary>
    public MigrationStatus Status
    {
        get { lock (_gate) return _status; }
    }

    /// <summary>Raised after each move, on the moving thread, outside the lock; in order.</summary>
    public event Action<MigrationStatus>? Changed;

    /// <summary>True if the table has the move.</summary>
    /// <param name="from">Status left.</param>
    /// <param name="to">Status entered.</param>
    /// <returns>The table's entry.</returns>
    public static bool IsLegal(MigrationStatus from, MigrationStatus to) => s_legal.Contains((from, to));

    /// <summary>Moves if the present status is the expected one.</summary>
    /// <param name="from">Expected status.</param>
    /// <param name="to">New status.</param>
    /// <returns>False if somebody else moved first; nothing has changed then.</returns>
    /// <exception cref="InvalidOperationException">The table lacks the move: a bug of the caller.</exception>
    public bool TryMove(MigrationStatus from, MigrationStatus to)
    {
        if (!IsLegal(from, to)) throw new InvalidOperationException($"illegal migration status change {from.ToWireName()} to {to.ToWireName()}");
        lock (_gate)
        {
            if (_status != from) return false;
            _status = to;
        }
        Changed?.Invoke(to);
        return true;
    }

    /// <summary>Moves from whatever the present status is, if the table has that move.</summary>
    /// <param name="to">New status.</param>
    /// <returns>False if the table lacks it; nothing has changed then.</returns>
    public bool TryMoveTo(MigrationStatus to)
    {
        lock (_gate)
        {
            if (!IsLegal(_status, to)) return false;
            _status = to;
        }
        Changed?.Invoke(to);
        return true;
    }
}
