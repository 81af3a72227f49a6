using Microsoft.Extensions.Logging;

namespace Vmm.Migration.Diagnostics;

/// <summary>The log messages of migrations and snapshots. Ids start at 3000; an event is named after QEMU's trace event where there is one.</summary>
internal static partial class MigrationLog
{
    [LoggerMessage(3000, LogLevel.Information, "migration status {Status}", EventName = "migrate_set_state")]
    internal static partial void StatusChanged(ILogger logger, string status);

    [LoggerMessage(3001, LogLevel.Information, "migrating to {Address}", EventName = "migration_start")]
    internal static partial void OutgoingStarted(ILogger logger, string address);

    [LoggerMessage(3002, LogLevel.Information, "waiting for an incoming migration on {Address}", EventName = "migration_incoming_start")]
    internal static partial void IncomingStarted(ILogger logger, string address);

    [LoggerMessage(3003, LogLevel.Error, "migration failed: {Error}", EventName = "migrate_error")]
    internal static partial void Failed(ILogger logger, string error);

    [LoggerMessage(3004, LogLevel.Debug, "switchover: {PendingBytes} bytes pending, threshold {ThresholdBytes}", EventName = "migrate_pending_exact")]
    internal static partial void Pending(ILogger logger, long pendingBytes, long thresholdBytes);

    [LoggerMessage(3005, LogLevel.Information, "downtime {TotalMs:F2} ms (drain {DrainMs:F2}, stop {StopMs:F2}, ram {RamMs:F2}, state {StateMs:F2}, send {SendMs:F2}, load {LoadMs:F2}, start {StartMs:F2})", EventName = "vmstate_downtime_checkpoint")]
    internal static partial void Downtime(ILogger logger, double totalMs, double drainMs, double stopMs, double ramMs, double stateMs, double sendMs, double loadMs, double startMs);

    [LoggerMessage(3006, LogLevel.Warning, "could not restart the VM after a failed migration: {Error}", EventName = "migrate_restart_failed")]
    internal static partial void RestartFailed(ILogger logger, string error);

    [LoggerMessage(3008, LogLevel.Warning, "{Channel}: the destination confirmed, but its host has not acknowledged this side's final word; if the VM stays paused there, start it there with 'cont --force'", EventName = "migrate_final_word")]
    internal static partial void FinalWordLost(ILogger logger, string channel);

    [LoggerMessage(3009, LogLevel.Warning, "could not clean up after a migration: {Error}", EventName = "migrate_cleanup_failed")]
    internal static partial void CleanupFailed(ILogger logger, string error);

    [LoggerMessage(3010, LogLevel.Error, "a handler of StatusChanged failed: {Error}", EventName = "migrate_handler_failed")]
    internal static partial void HandlerFailed(ILogger logger, string error);

    [LoggerMessage(3011, LogLevel.Warning, "the migration did not converge within x-precopy-deadline, {DeadlineMs} ms: {Outcome}; {LeftBytes} bytes were left", EventName = "migration_deadline")]
    internal static partial void Deadline(ILogger logger, ulong deadlineMs, string outcome, long leftBytes);

    [LoggerMessage(3014, LogLevel.Information, "guest throttled by {Percent} %", EventName = "cpu_throttle_set")]
    internal static partial void Throttled(ILogger logger, int percent);

    [LoggerMessage(3007, LogLevel.Warning, "snapshot '{Name}' is skipped: {Reason}", EventName = "snapshot_skipped")]
    internal static partial void SnapshotSkipped(ILogger logger, string name, string reason);

    [LoggerMessage(3020, LogLevel.Warning, "a connection on {Address} was closed: it begins with {FirstBytes}, which is neither a migration stream nor a channel of multifd", EventName = "migration_foreign_connection")]
    internal static partial void ForeignConnection(ILogger logger, string address, string firstBytes);

    [LoggerMessage(3021, LogLevel.Debug, "a connection on {Address} was closed: {Reason}", EventName = "migration_connection_dropped")]
    internal static partial void ConnectionDropped(ILogger logger, string address, string reason);

    [LoggerMessage(3022, LogLevel.Warning, "a connection for an incoming migration cannot be accepted yet: {Reason}", EventName = "migration_cannot_accept")]
    internal static partial void CannotAccept(ILogger logger, string reason);

    [LoggerMessage(3013, LogLevel.Warning, "after an incoming migration that failed: {Error}", EventName = "migrate_reset_failed")]
    internal static partial void ResetFailed(ILogger logger, string error);

    [LoggerMessage(3012, LogLevel.Warning, "a device threw at the end of a snapshot: {Error}", EventName = "snapshot_end_failed")]
    internal static partial void SnapshotEndFailed(ILogger logger, string error);

    [LoggerMessage(3023, LogLevel.Warning, "'{Folder}' is left over and could not be removed: {Reason}", EventName = "snapshot_leftover")]
    internal static partial void SnapshotLeftover(ILogger logger, string folder, string reason);
}
