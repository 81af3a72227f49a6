namespace Vmm.Core.RunStates;

/// <summary>QEMU's RunState values in QEMU's order; <see cref="RunStateNames"/> gives the wire names.</summary>
public enum RunState
{
    /// <summary>Stopped by the debugger.</summary>
    Debug,
    /// <summary>Waits for an incoming migration, or loads one.</summary>
    InMigrate,
    /// <summary>An internal error; only a reset helps.</summary>
    InternalError,
    /// <summary>Stopped by an I/O error of a device.</summary>
    IoError,
    /// <summary>Stopped by the user.</summary>
    Paused,
    /// <summary>Stopped after a migration to another host.</summary>
    PostMigrate,
    /// <summary>Not started yet.</summary>
    PreLaunch,
    /// <summary>Stopped for the last part of a migration.</summary>
    FinishMigrate,
    /// <summary>Loading a snapshot.</summary>
    RestoreVm,
    /// <summary>The guest runs.</summary>
    Running,
    /// <summary>Saving a snapshot.</summary>
    SaveVm,
    /// <summary>The guest shut down; only a reset helps.</summary>
    Shutdown,
    /// <summary>The guest suspended itself to RAM.</summary>
    Suspended,
    /// <summary>Stopped by the watchdog.</summary>
    Watchdog,
    /// <summary>The guest panicked.</summary>
    GuestPanicked,
    /// <summary>COLO checkpoint.</summary>
    Colo,
}

/// <summary>Wire names of <see cref="RunState"/> (QMP and the <c>globalstate</c> section).</summary>
public static class RunStateNames
{
    private static readonly string[] s_names =
    [
        "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate", "restore-vm", "running",
        "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo",
    ];

    /// <summary>All names, indexed by the enum's value.</summary>
    public static IReadOnlyList<string> All => s_names;

    /// <summary>Gives the wire name of a state.</summary>
    /// <returns>E.g. <c>finish-migrate</c>.</returns>
    public static string ToWireName(this RunState state) => s_names[(int)state];

    /// <summary>Finds a state by its wire name.</summary>
    /// <returns>False for an unknown name.</returns>
    public static bool TryParse(string name, out RunState state)
    {
        int i = Array.IndexOf(s_names, name);
        state = (RunState)Math.Max(i, 0);
        return i >= 0;
    }
}
