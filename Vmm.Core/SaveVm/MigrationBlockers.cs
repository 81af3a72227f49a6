using Vmm.Core.Errors;

namespace Vmm.Core.SaveVm;

/// <summary>QEMU's MigMode.</summary>
public enum MigrationMode
{
    /// <summary>Ordinary migration.</summary>
    Normal,
    /// <summary>The state goes to a file and RAM stays in place; a new process loads it after a reboot of the host or the VMM.</summary>
    CprReboot,
    /// <summary>A new process on this host takes over memory and descriptors.</summary>
    CprTransfer,
    /// <summary>The process replaces its own program.</summary>
    CprExec,
}

/// <summary>Which modes a blocker or a notifier concerns.</summary>
[Flags]
public enum MigrationModes
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>Ordinary migration.</summary>
    Normal = 1,
    /// <summary>cpr-reboot.</summary>
    CprReboot = 2,
    /// <summary>cpr-transfer.</summary>
    CprTransfer = 4,
    /// <summary>cpr-exec.</summary>
    CprExec = 8,
    /// <summary>Every mode.</summary>
    All = 15,
}

/// <summary>
/// Reasons why this VM cannot migrate, by mode. Thread-safe. Adding a blocker succeeds unless a migration runs (QEMU: <c>migrate_add_blocker_modes</c>).
/// </summary>
public sealed class MigrationBlockers
{
    private readonly Lock _gate = new();
    private readonly List<(string Reason, MigrationModes Modes)> _entries = [];
    private bool _frozen;

    /// <summary>The VM must always be able to migrate: whoever would block mode normal is refused (QEMU: <c>-only-migratable</c>).</summary>
    internal bool OnlyMigratable { get; set; }

    /// <summary>Adds a blocker.</summary>
    /// <param name="reason">Shown to the user.</param>
    /// <param name="modes">Modes it blocks.</param>
    /// <returns>Dispose to remove it.</returns>
    /// <exception cref="MigrationBlockedException">A migration or snapshot runs, or the VM must always be able to migrate.</exception>
    public IDisposable Add(string reason, MigrationModes modes = MigrationModes.All)
    {
        ArgumentException.ThrowIfNullOrEmpty(reason);
        if (OnlyMigratable && (modes & MigrationModes.Normal) != 0)
            throw new MigrationBlockedException($"disallowing migration blocker (--only-migratable) for: {reason}");
        lock (_gate)
        {
            if (_frozen) throw new MigrationBlockedException($"disallowing migration blocker (migration/snapshot in progress) for: {reason}");
            return AddLate(reason, modes);
        }
    }

    /// <summary>
    /// Adds a blocker for something that has happened and cannot be refused, such as the loss of a device. A migration that runs goes on: whoever adds the
    /// blocker makes it fail.
    /// </summary>
    /// <param name="reason">Shown to the user.</param>
    /// <param name="modes">Modes it blocks.</param>
    /// <returns>Dispose to remove it.</returns>
    public IDisposable AddLate(string reason, MigrationModes modes)
    {
        ArgumentException.ThrowIfNullOrEmpty(reason);
        var entry = (reason, modes);
        lock (_gate) _entries.Add(entry);
        return new Registration(() => { lock (_gate) _entries.Remove(entry); });
    }

    /// <summary>Lists the reasons that block a mode; empty when nothing does.</summary>
    public IReadOnlyList<string> Reasons(MigrationMode mode)
    {
        var bit = (MigrationModes)(1 << (int)mode);
        lock (_gate) return [.. _entries.Where(e => (e.Modes & bit) != 0).Select(static e => e.Reason)];
    }

    /// <summary>Throws if something blocks a mode.</summary>
    /// <exception cref="MigrationBlockedException">Lists all reasons.</exception>
    public void ThrowIfBlocked(MigrationMode mode)
    {
        IReadOnlyList<string> reasons = Reasons(mode);
        if (reasons.Count > 0) throw new MigrationBlockedException($"migration is blocked: {string.Join("; ", reasons)}");
    }

    /// <summary>Refuses new blockers until the result is disposed, for as long as a migration or snapshot runs.</summary>
    /// <returns>Dispose to allow blockers again.</returns>
    public IDisposable Freeze()
    {
        lock (_gate) _frozen = true;
        return new Registration(() => { lock (_gate) _frozen = false; });
    }
}

/// <summary>
/// Moments of a migration that devices are told of (QEMU: <c>MigrationEventType</c>). A snapshot is announced in the same way, as a migration in mode normal
/// after which the VM goes on here in either case (QEMU tells nobody, so a device could stay in a migration state).
/// </summary>
public enum MigrationEvent
{
    /// <summary>A migration is about to start; a handler that throws stops it.</summary>
    PrecopySetup,
    /// <summary>It completed: after a migration the VM is elsewhere, after a snapshot it goes on here.</summary>
    PrecopyDone,
    /// <summary>It failed or was cancelled; the VM goes on here.</summary>
    PrecopyFailed,
}

/// <summary>Migration-state notifiers (QEMU: <c>migration_add_notifier_modes</c>). Thread-safe.</summary>
public sealed class MigrationNotifiers
{
    private readonly Lock _gate = new();
    private readonly List<(Action<MigrationEvent> Call, MigrationModes Modes)> _entries = [];

    /// <summary>Adds a notifier.</summary>
    /// <param name="call">Called with the BQL held; throws on <see cref="MigrationEvent.PrecopySetup"/> to stop the migration.</param>
    /// <param name="modes">Modes of which it is told.</param>
    /// <returns>Dispose to remove it.</returns>
    public IDisposable Add(Action<MigrationEvent> call, MigrationModes modes = MigrationModes.Normal)
    {
        ArgumentNullException.ThrowIfNull(call);
        var entry = (call, modes);
        lock (_gate) _entries.Add(entry);
        return new Registration(() => { lock (_gate) _entries.Remove(entry); });
    }

    /// <summary>
    /// Calls every notifier of a mode. A notifier that throws on <see cref="MigrationEvent.PrecopySetup"/> ends the calls; on any other moment the remaining
    /// notifiers are called first. BQL: held.
    /// </summary>
    /// <exception cref="Exception">The first exception of a notifier.</exception>
    public void Notify(MigrationEvent what, MigrationMode mode)
    {
        Action<MigrationEvent>[] calls;
        lock (_gate) calls = [.. _entries.Where(e => (e.Modes & (MigrationModes)(1 << (int)mode)) != 0).Select(static e => e.Call)];
        if (what != MigrationEvent.PrecopySetup)
        {
            Each.Call(calls, call => call(what));
            return;
        }
        foreach (Action<MigrationEvent> call in calls) call(what);
    }
}
