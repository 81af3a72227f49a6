using Microsoft.Extensions.Logging;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>Log of the migration of VFIO devices; ids from 2100.</summary>
internal static partial class VfioMigrationLog
{
    [LoggerMessage(2100, LogLevel.Information, "device '{Device}' migrates by protocol v{Version} ({Flags}), own DMA log: {HasLog}", EventName = "vfio_migration_realize")]
    internal static partial void MigrationReady(ILogger logger, string device, int version, string flags, bool hasLog);

    [LoggerMessage(2101, LogLevel.Information, "{Reason}", EventName = "vfio_migration_blocked")]
    internal static partial void MigrationBlocked(ILogger logger, string reason);

    [LoggerMessage(2102, LogLevel.Information, "device '{Device}' is in {State}", EventName = "vfio_migration_set_device_state")]
    internal static partial void StateChanged(ILogger logger, string device, string state);

    [LoggerMessage(2103, LogLevel.Warning, "device '{Device}' was left in a migration state by somebody else and has been reset", EventName = "vfio_migration_left_over")]
    internal static partial void LeftOverState(ILogger logger, string device);

    [LoggerMessage(2104, LogLevel.Warning, "nobody logs the DMA writes of device '{Device}': each pass sends all RAM", EventName = "vfio_migration_no_dirty_tracking")]
    internal static partial void NoDirtyTracking(ILogger logger, string device);

    [LoggerMessage(2105, LogLevel.Warning, "device '{Device}' after the migration: {Reason}", EventName = "vfio_save_cleanup")]
    internal static partial void CleanupFailed(ILogger logger, string device, string reason);

    [LoggerMessage(2106, LogLevel.Warning, "the log of DMA writes of {Source} is lost ({Errno}): all RAM counts as written", EventName = "vfio_dirty_log_lost")]
    internal static partial void DirtyLogLost(ILogger logger, string source, string errno);

    [LoggerMessage(2108, LogLevel.Warning, "device '{Device}' does not say how much state it has: {Mebibytes} MiB count, so the VM does not stop unless downtime-limit allows for them. "
        + "Option x-migration-stop-copy-size of the device says how much to expect", EventName = "vfio_save_setup_size")]
    internal static partial void SizeUnknown(ILogger logger, string device, ulong mebibytes);

    [LoggerMessage(2107, LogLevel.Warning, "the log of DMA writes of {Source} could not be stopped ({Errno})", EventName = "vfio_dirty_log_stop")]
    internal static partial void DirtyLogStopFailed(ILogger logger, string source, string errno);
}
