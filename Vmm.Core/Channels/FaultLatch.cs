namespace Vmm.Core.Channels;

/// <summary>
/// Holds the first reason for which something ends, and what must be shut because of it. The reason is stored before anything is shut, so
/// whoever wakes from a failed call consults the latch before the errno (QEMU: <c>qemu_file_shutdown</c>). Thread-safe.
/// </summary>
internal sealed class FaultLatch
{
    private readonly object _gate = new();
    private readonly List<Action> _shutdowns = [];
    private volatile Exception? _reason;
    private Thread? _shutting;

    /// <summary>The first reason, or null while all is well.</summary>
    public Exception? Reason => _reason;

    /// <summary>True once a reason is stored.</summary>
    public bool IsSet => _reason is not null;

    /// <summary>Stores a reason if none is stored and runs the registered shutdowns.</summary>
    /// <param name="reason">Why.</param>
    /// <returns>True if this reason was the first.</returns>
    public bool Set(Exception reason)
    {
        ArgumentNullException.ThrowIfNull(reason);
        Action[] shutdowns;
        lock (_gate)
        {
            if (_reason is not null) return false;
            _reason = reason;
            _shutting = Thread.CurrentThread;
            shutdowns = [.. _shutdowns];
        }
        try
        {
            foreach (Action shutdown in shutdowns) shutdown();
        }
        finally
        {
            lock (_gate)
            {
                _shutting = null;
                Monitor.PulseAll(_gate);
            }
        }
        return true;
    }

    /// <summary>Registers something to shut; runs at once if a reason is stored already. It must not throw or block.</summary>
    /// <param name="shutdown">The action.</param>
    /// <returns>Dispose to forget it; the action does not run any more when that returns, unless it is the action that disposes.</returns>
    public IDisposable OnSet(Action shutdown)
    {
        lock (_gate)
        {
            if (_reason is null)
            {
                _shutdowns.Add(shutdown);
                return new Registration(() => Forget(shutdown));
            }
        }
        shutdown();
        return new Registration(static () => { });
    }

    /// <summary>Throws the stored reason, if any.</summary>
    public void ThrowIfSet()
    {
        if (_reason is { } reason) System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(reason);
    }

    /// <summary>What a shutdown uses may be disposed next, so one that runs on another thread is waited for.</summary>
    private void Forget(Action shutdown)
    {
        lock (_gate)
        {
            _shutdowns.Remove(shutdown);
            while (_shutting is { } thread && thread != Thread.CurrentThread) Monitor.Wait(_gate);
        }
    }
}
