using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Threading;

namespace Vmm.Core.Workloads;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// The thread of a workload: runs steps at a rate while it is told to, and is quiet when a stop or a pause returns, at most one step later.
/// Waits in the kernel, never spins. Masters may call from any thread.
/// </summary>
internal sealed class WorkloadThread : IDisposable
{
    private const int BurstSteps = 1024;
    private const int SliceMs = 5;

    private readonly long _stepsPerSecond;
    private readonly Action _attach;
    private readonly Action _step;
    private readonly Func<bool> _isUnpaced;
    private readonly object _gate = new();
    private readonly Task _task;
    private bool _running;
    private int _pauses;
    private bool _ended;
    private bool _quiet;
    private bool _attached;
    private long _epoch;
    private long _done;
    private Exception? _failure;
    // Polled by the thread between two steps.
    private volatile bool _go;

    /// <summary>Starts the thread, quiet.</summary>
    /// <param name="name">Thread name.</param>
    /// <param name="stepsPerSecond">0 for no limit.</param>
    /// <param name="attach">Called after each start, before the first step.</param>
    /// <param name="step">One step.</param>
    /// <param name="isUnpaced">Whether the rate does not count now.</param>
    internal WorkloadThread(string name, long stepsPerSecond, Action attach, Action step, Func<bool> isUnpaced)
    {
        _stepsPerSecond = stepsPerSecond;
        _attach = attach;
        _step = step;
        _isUnpaced = isUnpaced;
        _task = WorkerThread.Run(name, Run);
    }

    /// <summary>Starts or stops; quiet when a stop returns.</summary>
    /// <exception cref="DeviceStateException">A start after the thread died; the cause is inside.</exception>
    internal void SetRunning(bool running)
    {
        lock (_gate)
        {
            if (running && _failure is not null) throw new DeviceStateException($"the workload's thread has died: {_failure.Message}", _failure);
            _running = running;
            if (running) _attached = false; // RAM may be another machine's by now.
            Signal();
            if (!running) WaitUntilQuiet();
        }
    }

    /// <summary>Runs an action while the thread is quiet.</summary>
    internal void Paused(Action action)
    {
        lock (_gate)
        {
            _pauses++;
            Signal();
            WaitUntilQuiet();
        }
        try
        {
            action();
        }
        finally
        {
            lock (_gate)
            {
                _pauses--;
                Signal();
            }
        }
    }

    /// <summary>Ends the thread and waits for it.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _ended = true;
            Signal();
        }
        _task.WaitAndUnwrapException();
    }

    private void Signal()
    {
        _go = _running && _pauses == 0 && !_ended;
        Monitor.PulseAll(_gate);
    }

    private void WaitUntilQuiet()
    {
        while (!_quiet) Monitor.Wait(_gate);
    }

    private void Run()
    {
        try
        {
            while (WaitForTurn(out int steps))
                for (; steps > 0 && _go; steps--, _done++) _step();
        }
#pragma warning disable CA1031 // Kept for the next start, which reports it; whoever waits for quiet must not wait for ever.
        catch (Exception e)
#pragma warning restore CA1031
        {
            lock (_gate)
            {
                _failure = e;
                _quiet = true;
                Signal();
            }
        }
    }

    /// <summary>Waits, quietly, until steps are due. False at the end.</summary>
    private bool WaitForTurn(out int steps)
    {
        lock (_gate)
        {
            while (true)
            {
                _quiet = true;
                Monitor.PulseAll(_gate);
                while (!_go)
                {
                    steps = 0;
                    if (_ended) return false;
                    Monitor.Wait(_gate);
                }
                bool fresh = !_attached;
                _quiet = false;
                if (fresh)
                {
                    _attached = true;
                    Monitor.Exit(_gate);
                    try
                    {
                        _attach();
                    }
                    finally
                    {
                        Monitor.Enter(_gate);
                    }
                    Restart();
                }
                if (_isUnpaced())
                {
                    Restart();
                    steps = BurstSteps;
                    return true;
                }
                steps = Due(out int waitMs);
                if (steps > 0) return true;
                _quiet = true;
                Monitor.PulseAll(_gate);
                Monitor.Wait(_gate, waitMs);
            }
        }
    }

    private void Restart()
    {
        _epoch = Stopwatch.GetTimestamp();
        _done = 0;
    }

    /// <summary>Steps due by now, or how long to wait for the next few.</summary>
    private int Due(out int waitMs)
    {
        waitMs = 0;
        if (_stepsPerSecond == 0) return BurstSteps;
        double seconds = Stopwatch.GetElapsedTime(_epoch).TotalSeconds;
        long due = (long)(seconds * _stepsPerSecond) - _done;
        // What could not be done in time is not caught up with: a guest that was held up does not run faster later.
        if (due > _stepsPerSecond / 10 + BurstSteps) Restart();
        if (due > 0) return (int)Math.Min(due, BurstSteps);
        waitMs = (int)Math.Clamp(Math.Ceiling((((_done + 1.0) / _stepsPerSecond) - seconds) * 1000), SliceMs, 1000);
        return 0;
    }
}
