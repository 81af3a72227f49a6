using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;

namespace Vmm.Core.Workloads;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// The thread of a workload. It runs steps at a rate between start and stop. When a stop or a pause returns, the thread is quiet; that takes at most
/// one step. The thread waits in the kernel and never spins, and it sleeps as vCPUs do while the guest is throttled. Any thread may call.
/// </summary>
internal sealed class WorkloadThread : IDisposable
{
    private readonly WorkloadPace _pace;
    private readonly IDisposable _throttled;
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
    private Exception? _failure;
    // The thread reads it between two steps.
    private volatile bool _go;

    /// <summary>Starts the thread; it is quiet until the first start.</summary>
    /// <param name="name">Name of the thread.</param>
    /// <param name="stepsPerSecond">Rate; 0 for no limit.</param>
    /// <param name="attach">Called after each start, before the first step.</param>
    /// <param name="step">Does one step.</param>
    /// <param name="isUnpaced">True while the rate does not apply.</param>
    /// <param name="throttle">The VM's; null for none.</param>
    internal WorkloadThread(string name, long stepsPerSecond, Action attach, Action step, Func<bool> isUnpaced, CpuThrottle? throttle = null)
    {
        throttle ??= new CpuThrottle();
        _pace = new WorkloadPace(stepsPerSecond, throttle);
        _attach = attach;
        _step = step;
        _isUnpaced = isUnpaced;
        _throttled = throttle.OnChange(() =>
        {
            lock (_gate) Monitor.PulseAll(_gate);
        });
        _task = WorkerThread.Run(name, Run);
    }

    /// <summary>Starts or stops the steps; when a stop returns, the thread is quiet.</summary>
    /// <exception cref="DeviceStateException">A start failed because the thread has died; the inner exception is the cause.</exception>
    internal void SetRunning(bool running)
    {
        lock (_gate)
        {
            if (running && _failure is not null) throw new DeviceStateException($"the workload's thread has died: {_failure.Message}", _failure);
            _running = running;
            if (running) _attached = false; // While the VM was stopped, a load may have replaced RAM.
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
        _throttled.Dispose();
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
            {
                for (; steps > 0 && _go; steps--)
                {
                    _step();
                    _pace.OnStep();
                }
            }
        }
#pragma warning disable CA1031 // The next start reports the exception; threads that wait for quiet must not wait forever.
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

    /// <summary>Waits until steps are due; the thread is quiet meanwhile. Returns false when the thread must end.</summary>
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
                    _pace.Restart();
                }
                if (SleepIfThrottled()) continue;
                if (_isUnpaced())
                {
                    _pace.Restart();
                    steps = WorkloadPace.BurstSteps;
                    return true;
                }
                steps = _pace.Due(out int waitMs);
                if (steps > 0) return true;
                _quiet = true;
                Monitor.PulseAll(_gate);
                Monitor.Wait(_gate, waitMs);
            }
        }
    }

    /// <summary>Sleeps if the throttle wants it; the thread is quiet meanwhile. The lock is held.</summary>
    /// <returns>False if it is not time to sleep.</returns>
    private bool SleepIfThrottled()
    {
        if (!_pace.BeginSleep()) return false;
        _quiet = true;
        Monitor.PulseAll(_gate);
        while (_go && _pace.SleepLeftMs is > 0 and var left) Monitor.Wait(_gate, left);
        _pace.EndSleep();
        return true;
    }
}
