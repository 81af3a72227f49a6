namespace Vmm.Core.Channels;

/// <summary>
/// Keeps the first reason for a failure and runs the registered shutdowns. The latch stores the reason before it runs them, so a thread whose call
/// fails because of a shutdown finds the true reason here rather than in the errno (QEMU: <c>qemu_file_shutdown</c>). Thread-safe.
/// </summary>
internal sealed class FaultLatch
{
    private readonly object _gate = new();
    private readonly List<Action> _shutdowns = [];
    private volatile Exception? _reason;
    private Thread? _shutting;

    /// <summary>The first reason, or null without a failure.</summary>
    public Exception? Reason => _reason;

    /// <summary>True once a reason is stored.</summary>
    public bool IsSet => _reason is not null;

    /// <summary>Stores a reason if none is stored and runs the registered shutdowns.</summary>
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

    /// <summary>Registers a shutdown, which must not throw or block. If a reason is stored already, it runs at once.</summary>
    /// <returns>Dispose to remove it. The shutdown does not run after that returns, unless the shutdown itself disposes.</returns>
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

    /// <summary>Waits for a shutdown that runs on another thread, because the caller may dispose what it uses next.</summary>
    private void Forget(Action shutdown)
    {
        lock (_gate)
        {
            _shutdowns.Remove(shutdown);
            while (_shutting is { } thread && thread != Thread.CurrentThread) Monitor.Wait(_gate);
        }
    }
}
