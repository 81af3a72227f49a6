using System.Diagnostics;
using Vmm.Core.Interop;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>
/// Measures how long this host takes, at this moment, until spinning threads with realtime priority have noticed a flag and reported it. No stop of
/// spinning vCPUs can be faster.
/// </summary>
internal sealed class SpinFloor : IDisposable
{
    private readonly OwnedFd _done = Posix.EventFd();
    private readonly List<(OwnedFd Go, Thread Thread)> _threads = [];
    private readonly int[] _ids;
    private int _spinning, _answers;
    private volatile bool _end, _stop;

    internal SpinFloor(int threads)
    {
        _ids = new int[threads];
        using var ready = new CountdownEvent(threads);
        for (int i = 0; i < threads; i++)
        {
            int index = i;
            OwnedFd go = Posix.EventFd();
            var thread = new Thread(() =>
            {
                _ids[index] = Posix.ThreadId;
                ready.Signal();
                while (true)
                {
                    Posix.Poll(go, Posix.POLLIN, null, -1, out _);
                    Posix.DrainEventFd(go);
                    if (_end) return;
                    Interlocked.Increment(ref _spinning);
                    while (!_stop)
                    {
                        // Spin without a system call, as a vCPU in the guest does.
                    }
                    if (Interlocked.Increment(ref _answers) == threads) Posix.SignalEventFd(_done);
                }
            });
            _threads.Add((go, thread));
            thread.Start();
        }
        ready.Wait();
    }

    /// <summary>Lets all threads spin, then stops them with the same priority that a stop gives to vCPUs.</summary>
    internal TimeSpan Measure()
    {
        (_spinning, _answers, _stop) = (0, 0, false);
        foreach ((OwnedFd go, _) in _threads) Posix.SignalEventFd(go);
        KvmGuest.WaitFor(() => Volatile.Read(ref _spinning) == _ids.Length, "all threads spin");
        var raised = new List<RealtimeBoost?>(_ids.Length + 1);
        long start = Stopwatch.GetTimestamp();
        raised.Add(RealtimeBoost.Raise(0));
        foreach (int id in _ids) raised.Add(RealtimeBoost.Raise(id));
        _stop = true;
        Posix.Poll(_done, Posix.POLLIN, null, -1, out _);
        TimeSpan taken = Stopwatch.GetElapsedTime(start);
        Posix.DrainEventFd(_done);
        for (int i = raised.Count - 1; i >= 0; i--) raised[i]?.Lower();
        return taken;
    }

    public void Dispose()
    {
        _end = _stop = true;
        foreach ((OwnedFd go, Thread thread) in _threads)
        {
            Posix.SignalEventFd(go);
            thread.Join();
            go.Dispose();
        }
        _done.Dispose();
    }
}
