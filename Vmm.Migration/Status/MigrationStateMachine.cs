using static Vmm.Migration.Status.MigrationStatus;

namespace Vmm.Migration.Status;

/// <summary>
/// The status of a VM's migration, and the legal moves between statuses as data (stream 11.1, 11.2). Thread-safe, so a move may lose against another thread's:
/// callers must use the answer of <see cref="TryMove"/> (QEMU: <c>migrate_set_state</c>).
/// </summary>
internal sealed class MigrationStateMachine
{
    /// <summary>Every legal move, on source and destination. From a terminal status the next attempt goes back to setup.</summary>
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

    /// <summary>The status in force.</summary>
    public MigrationStatus Status
    {
        get { lock (_gate) return _status; }
    }

    /// <summary>Raised after each move, on the thread that moved, without the lock.</summary>
    public event Action<MigrationStatus>? Changed;

    /// <summary>True if the table has the move.</summary>
    public static bool IsLegal(MigrationStatus from, MigrationStatus to) => s_legal.Contains((from, to));

    /// <summary>Moves from one status to another if the first is in force.</summary>
    /// <returns>False if another thread moved first; then this call changes nothing.</returns>
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

    /// <summary>Moves to a status from the one in force, whichever that is.</summary>
    /// <returns>False if the table lacks the move; then this call changes nothing.</returns>
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
