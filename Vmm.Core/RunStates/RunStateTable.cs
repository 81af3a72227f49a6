namespace Vmm.Core.RunStates;

using static Vmm.Core.RunStates.RunState;

/// <summary>QEMU's table of legal run-state transitions (QEMU: <c>runstate_transitions_def</c>).</summary>
internal static class RunStateTable
{
    private static readonly (RunState From, RunState[] To)[] s_rows =
    [
        (PreLaunch, [InMigrate, Running, FinishMigrate, Suspended]),
        (Debug, [Running, FinishMigrate, PreLaunch, Suspended]),
        (InMigrate, [InternalError, IoError, Paused, Running, Shutdown, Suspended, Watchdog, GuestPanicked, FinishMigrate, PreLaunch, PostMigrate, Colo]),
        (InternalError, [Paused, FinishMigrate, PreLaunch]),
        (IoError, [Running, FinishMigrate, PreLaunch]),
        (Paused, [Running, FinishMigrate, PostMigrate, PreLaunch, Colo, Suspended]),
        (PostMigrate, [Running, FinishMigrate, PreLaunch]),
        (FinishMigrate, [Running, Paused, PostMigrate, PreLaunch, Colo, InternalError, IoError, Shutdown, Suspended, Watchdog, GuestPanicked]),
        (RestoreVm, [Running, PreLaunch, Paused, Suspended]),
        (Colo, [Running, PreLaunch, Shutdown]),
        (Running, [Debug, InternalError, IoError, Paused, FinishMigrate, RestoreVm, SaveVm, Shutdown, Watchdog, GuestPanicked, Colo, Suspended]),
        (SaveVm, [Running, Suspended]),
        (Shutdown, [Paused, FinishMigrate, PreLaunch, Colo]),
        (Suspended, [Running, FinishMigrate, PreLaunch, Colo, Paused, SaveVm, RestoreVm, Shutdown]),
        (Watchdog, [Running, FinishMigrate, PreLaunch, Colo]),
        (GuestPanicked, [Running, FinishMigrate, PreLaunch]),
    ];

    private static readonly bool[,] s_legal = Build();

    /// <summary>True if the transition is legal; a state may always change to itself.</summary>
    public static bool IsLegal(RunState from, RunState to) => from == to || s_legal[(int)from, (int)to];

    /// <summary>True for the state in which the guest executes: <see cref="Running"/>.</summary>
    public static bool IsRunning(RunState state) => state == Running;

    /// <summary>True for the states with a live guest: running and suspended (QEMU: <c>runstate_is_live</c>).</summary>
    public static bool IsLive(RunState state) => state is Running or Suspended;

    /// <summary>True for the states that only a reset leaves: internal-error and shutdown (QEMU: <c>runstate_needs_reset</c>).</summary>
    public static bool NeedsReset(RunState state) => state is InternalError or Shutdown;

    private static bool[,] Build()
    {
        int n = Enum.GetValues<RunState>().Length;
        bool[,] legal = new bool[n, n];
        foreach ((RunState from, RunState[] to) in s_rows)
            foreach (RunState t in to) legal[(int)from, (int)t] = true;
        return legal;
    }
}
