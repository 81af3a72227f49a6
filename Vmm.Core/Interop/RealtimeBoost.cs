using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>
/// Gives a thread a realtime priority for the short time in which another thread waits for it: on a busy host a thread that is ready may otherwise
/// wait many milliseconds for a CPU. Needs CAP_SYS_NICE or RLIMIT_RTPRIO; does nothing without them.
/// </summary>
internal sealed class RealtimeBoost
{
    private const int LowestPriority = 1;

    private readonly int _threadId, _policy;
    private bool _raised;

    private RealtimeBoost(int threadId, int policy)
    {
        (_threadId, _policy) = (threadId, policy);
        var priority = new LibCExtra.SchedParam { Priority = LowestPriority };
        // SCHED_RESET_ON_FORK: threads that it starts meanwhile do not inherit the priority.
        _raised = LibCExtra.sched_setscheduler(threadId, LibC.SCHED_FIFO | LibC.SCHED_RESET_ON_FORK, in priority) == 0;
    }

    /// <summary>True if the thread has the realtime priority.</summary>
    internal bool IsRaised => _raised;

    /// <summary>Runs a body with the calling thread raised.</summary>
    /// <param name="wanted">False to run the body without raising the thread.</param>
    /// <param name="body">Short work that another thread waits for.</param>
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

    /// <summary>Raises a thread of this process, unless it has a realtime policy already.</summary>
    /// <param name="threadId">The kernel's id of the thread; 0 for the calling thread.</param>
    /// <returns>Call <see cref="Lower"/> on it; any thread may, if an id was given.</returns>
    public static RealtimeBoost? Raise(int threadId)
    {
        int policy = LibC.sched_getscheduler(threadId);
        // These policies have no priority that Lower would have to restore.
        bool ordinary = policy == LibC.SCHED_OTHER || policy == LibC.SCHED_BATCH || policy == LibC.SCHED_IDLE;
        return ordinary ? new RealtimeBoost(threadId, policy) : null;
    }

    /// <summary>Gives the thread its old policy back. Does nothing if the thread has ended.</summary>
    public void Lower()
    {
        if (!_raised) return;
        _raised = false;
        var none = default(LibCExtra.SchedParam);
        _ = LibCExtra.sched_setscheduler(_threadId, _policy, in none);
    }
}
