namespace Vmm.Migration.Status;

/// <summary>QEMU's MigrationStatus, in its order; wire names by <see cref="MigrationStatusNames"/>.</summary>
public enum MigrationStatus
{
    /// <summary>No migration yet.</summary>
    None,
    /// <summary>Connecting, or listening on the destination.</summary>
    Setup,
    /// <summary>The migration is being cancelled.</summary>
    Cancelling,
    /// <summary>Cancelled; the VM is as before.</summary>
    Cancelled,
    /// <summary>RAM is moving while the VM runs.</summary>
    Active,
    /// <summary>Postcopy: device state is moving.</summary>
    PostcopyDevice,
    /// <summary>Postcopy: the destination runs.</summary>
    PostcopyActive,
    /// <summary>Postcopy: the connection is lost.</summary>
    PostcopyPaused,
    /// <summary>Postcopy: reconnecting.</summary>
    PostcopyRecoverSetup,
    /// <summary>Postcopy: recovering.</summary>
    PostcopyRecover,
    /// <summary>Done.</summary>
    Completed,
    /// <summary>Failed; clean-up is under way.</summary>
    Failing,
    /// <summary>Failed; the VM is as before.</summary>
    Failed,
    /// <summary>COLO.</summary>
    Colo,
    /// <summary>Stopped, waiting for <c>migrate-continue</c>.</summary>
    PreSwitchover,
    /// <summary>The VM is stopped and its device state moves.</summary>
    Device,
    /// <summary>Waiting for the guest to release a failover device.</summary>
    WaitUnplug,
}

/// <summary>Wire names and groups of <see cref="MigrationStatus"/>.</summary>
public static class MigrationStatusNames
{
    private static readonly string[] s_names =
    [
        "none", "setup", "cancelling", "cancelled", "active", "postcopy-device", "postcopy-active", "postcopy-paused", "postcopy-recover-setup",
        "postcopy-recover", "completed", "failing", "failed", "colo", "pre-switchover", "device", "wait-unplug",
    ];

    /// <summary>All names, indexed by the enum's value.</summary>
    public static IReadOnlyList<string> All => s_names;

    /// <summary>Gives the wire name, e.g. <c>pre-switchover</c>.</summary>
    public static string ToWireName(this MigrationStatus status) => s_names[(int)status];

    /// <summary>True for none, completed, failed and cancelled: no migration runs, and another may start.</summary>
    public static bool IsTerminal(this MigrationStatus status) =>
        status is MigrationStatus.None or MigrationStatus.Completed or MigrationStatus.Failed or MigrationStatus.Cancelled;
}
