using Vmm.Core.Interop;

namespace Vmm.Core.Threading;

/// <summary>Runs blocking work on a named thread and returns a task for it; bulk data moves on such threads.</summary>
public static class WorkerThread
{
    /// <summary>
    /// Lets a thread of this process go before all ordinary ones while somebody waits for it. Needs CAP_SYS_NICE or RLIMIT_RTPRIO; without them
    /// nothing happens.
    /// </summary>
    /// <param name="threadId">The kernel's id, 0 for the calling thread.</param>
    /// <returns>Dispose, on any thread if an id was given, to give the thread its own policy back; null when it has a realtime policy already.</returns>
    public static IDisposable? Raise(int threadId) => RealtimeBoost.Raise(threadId) is { } boost ? new Registration(boost.Lower) : null;

    /// <summary>Runs a body on a new background thread.</summary>
    /// <param name="name">Thread name; the kernel keeps 15 characters.</param>
    /// <param name="body">The work; it must not block on a task.</param>
    /// <returns>Completes when the body ends; faults with the body's exception.</returns>
    public static Task Run(string name, Action body)
    {
        ArgumentNullException.ThrowIfNull(body);
        var done = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        var thread = new Thread(() =>
        {
            try
            {
                body();
                done.SetResult();
            }
#pragma warning disable CA1031 // The task carries the body's exception; one that escaped the thread would end the process.
            catch (Exception e)
#pragma warning restore CA1031
            {
                done.SetException(e);
            }
        })
        { Name = name, IsBackground = true };
        thread.Start();
        return done.Task;
    }
}
