namespace Vmm.Core.Threading;

/// <summary>A named thread that looks like a task: bulk data moves on these, with blocking calls and spans.</summary>
public static class WorkerThread
{
    /// <summary>Runs a body on a new background thread.</summary>
    /// <param name="name">Shown by debuggers and tools; the kernel keeps 15 characters.</param>
    /// <param name="body">The work. It must never block on a task.</param>
    /// <returns>Completes with the body; carries its exception.</returns>
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
#pragma warning disable CA1031 // The task carries whatever the body threw; an escaping exception would end the process.
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
