using Vmm.Migration.Status;


namespace Vmm.Migration.Qmp;

/// <summary>The declared events (qmp 5).</summary>
internal static class QmpEvents
{
    internal static readonly QmpEnum ShutdownCause = new("none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
        "guest-shutdown", "guest-reset", "guest-panicked", "subsystem-reset", "snapshot-load");

    internal static readonly QmpEnum MigrationStatus = new([.. MigrationStatusNames.All]);

    internal static readonly QmpEnum VfioState = new("stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p",
        "pre-copy-p2p-prepare");

    internal static readonly QmpEnum JobStatus = new("undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting",
        "concluded", "null");

    private static readonly QmpObject s_cause = new(new("guest", QmpType.Bool), new("reason", ShutdownCause));

    internal static IReadOnlyList<QmpEventType> All { get; } =
    [
        new("STOP", QmpObject.Empty), new("RESUME", QmpObject.Empty), new("RESET", s_cause), new("SHUTDOWN", s_cause),
        new("MIGRATION", new QmpObject(new QmpMember("status", MigrationStatus))),
        new("MIGRATION_PASS", new QmpObject(new QmpMember("pass", QmpType.Int))),
        new("VFIO_MIGRATION", new QmpObject(new("device-id", QmpType.Str), new("qom-path", QmpType.Str), new("device-state", VfioState))),
        new(QmpServer.ExtensionPrefix + "DEVICE_LOST", new QmpObject(new("id", QmpType.Str), new("reason", QmpType.Str))),
        new(QmpServer.ExtensionPrefix + "DEVICE_RETURNED", new QmpObject(new QmpMember("id", QmpType.Str))),
        new("JOB_STATUS_CHANGE", new QmpObject(new("id", QmpType.Str), new("status", JobStatus))),
    ];
}
