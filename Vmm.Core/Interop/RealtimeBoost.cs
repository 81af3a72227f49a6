using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>
/// Lets a thread go before all ordinary ones for the moment in which somebody waits for it: on a busy host a thread that is ready may otherwise
/// stand in line for many milliseconds. Needs CAP_SYS_NICE or RLIMIT_RTPRIO; without them nothing happens.
/// </summary>
public sealed class RealtimeBoost
{
    private const int LowestPriority = 1;

    private readonly int _threadId, _policy;
    private bool _raised;

    private RealtimeBoost(int threadId, int policy)
    {
        (_threadId, _policy) = (threadId, policy);
        var priority = new LibCExtra.SchedParam { Priority = LowestPriority };
        // Threads that it starts meanwhile are ordinary ones.
        _raised = LibCExtra.sched_setscheduler(threadId, LibC.SCHED_FIFO | LibC.SCHED_RESET_ON_FORK, in priority) == 0;
    }

    /// <summary>Whether the thread was raised.</summary>
    internal bool IsRaised => _raised;

    /// <summary>Raises the calling thread for as long as something runs.</summary>
    /// <param name="wanted">False to only run it.</param>
    /// <param name="body">What somebody waits for; short.</param>
    internal static void During(bool wanted, Action body)
    {
        RealtimeBoost? boost = wanted ? Raise(0) : null;
        try
        {
            body();
        }
        finally
        {
            boost?.Lower();
        }
    }

    /// <summary>Raises a thread of this process; one that already has a realtime policy is left alone.</summary>
    /// <param name="threadId">The kernel's id, 0 for the calling thread.</param>
    /// <returns>To be given back with <see cref="Lower"/>, by any thread if an id was given.</returns>
    public static RealtimeBoost? Raise(int threadId)
    {
        int policy = LibC.sched_getscheduler(threadId);
        // These have no priority that would be lost.
        bool ordinary = policy == LibC.SCHED_OTHER || policy == LibC.SCHED_BATCH || policy == LibC.SCHED_IDLE;
        return ordinary ? new RealtimeBoost(threadId, policy) : null;
    }

    /// <summary>Gives the thread its own policy back. A thread that has ended is no loss.</summary>
    public void Lower()
    {
        if (!_raised) return;
        _raised = false;
        var none = default(LibCExtra.SchedParam);
        _ = LibCExtra.sched_setscheduler(_threadId, _policy, in none);
    }
}
