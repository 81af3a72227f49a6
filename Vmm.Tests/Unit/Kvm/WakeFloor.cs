using System.Diagnostics;
using Vmm.Core.Interop;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>How long this host takes, at this moment, to run so many realtime threads that somebody wakes: what no stop of vCPUs can be faster than.</summary>
internal sealed class WakeFloor : IDisposable
{
    private readonly OwnedFd _done = Posix.EventFd();
    private readonly List<(OwnedFd Go, Thread Thread)> _threads = [];
    private readonly int[] _ids;
    private int _answers;
    private volatile bool _end;

    internal WakeFloor(int threads)
    {
        _ids = new int[threads];
        using var ready = new CountdownEvent(threads);
        for (int i = 0; i < threads; i++)
        {
            int index = i;
            OwnedFd go = Posix.EventFd();
            var thread = new Thread(() =>
            {
                _ids[index] = LibC.gettid();
                ready.Signal();
                while (true)
                {
                    Posix.Poll(go, Posix.POLLIN, null, -1, out _);
                    Posix.DrainEventFd(go);
                    if (_end) return;
                    if (Interlocked.Increment(ref _answers) == threads) Posix.SignalEventFd(_done);
                }
            });
            _threads.Add((go, thread));
            thread.Start();
        }
        ready.Wait();
    }

    /// <summary>Wakes all and waits for all, with the priority that a stop has.</summary>
    internal TimeSpan Measure()
    {
        _answers = 0;
        var raised = new List<RealtimeBoost?>(_ids.Length + 1);
        long start = Stopwatch.GetTimestamp();
        raised.Add(RealtimeBoost.Raise(0));
        for (int i = 0; i < _ids.Length; i++)
        {
            raised.Add(RealtimeBoost.Raise(_ids[i]));
            Posix.SignalEventFd(_threads[i].Go);
        }
        Posix.Poll(_done, Posix.POLLIN, null, -1, out _);
        TimeSpan taken = Stopwatch.GetElapsedTime(start);
        Posix.DrainEventFd(_done);
        for (int i = raised.Count - 1; i >= 0; i--) raised[i]?.Lower();
        return taken;
    }

    public void Dispose()
    {
        _end = true;
        foreach ((OwnedFd go, Thread thread) in _threads)
        {
            Posix.SignalEventFd(go);
            thread.Join();
            go.Dispose();
        }
        _done.Dispose();
    }
}
