using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Multifd;

/// <summary>What one packet carries: pages of one RAM block, or a buffer of device state. Pooled by <see cref="SendQueue"/>.</summary>
internal sealed class SendJob
{
    /// <summary>The block of the pages; null for device state.</summary>
    internal RamBlock? Block { get; set; }

    /// <summary>Page indexes; the complement of one whose page is known to be zero.</summary>
    internal long[] Pages { get; } = new long[MultifdPacket.PagesAllocated];

    /// <summary>Pages in use.</summary>
    internal int Count { get; set; }

    /// <summary>Device state, whose owner is the job; null for pages.</summary>
    internal StateBuffer? State { get; set; }

    /// <summary>Section name and instance of the device.</summary>
    internal string IdStr { get; set; } = string.Empty;

    /// <summary>See <see cref="IdStr"/>.</summary>
    internal int InstanceId { get; set; }
}

/// <summary>What a channel does next.</summary>
internal enum SendStep
{
    /// <summary>Send the job.</summary>
    Job,
    /// <summary>Send a SYNC.</summary>
    Sync,
    /// <summary>Everything is sent.</summary>
    End,
}

/// <summary>
/// The jobs that wait for the channels of one attempt: whichever channel is free takes the next one. A SYNC divides jobs: no channel takes a job from behind it
/// before it has sent its own SYNC, and no channel sends its SYNC while jobs before it wait (QEMU: <c>multifd_send_sync_main</c>). Memory is bounded: a
/// producer waits while the queue is full, until half of it is taken, so that threads change places seldom. Thread-safe.
/// </summary>
/// <param name="channels">How many channels take jobs.</param>
internal sealed class SendQueue(int channels)
{
    private readonly object _gate = new();
    // At least one job a channel: then a waiting producer and a waiting channel never wait at the same time, so that one condition serves both.
    private readonly int _capacity = Math.Max(8, 2 * channels);
    private readonly Queue<(SendJob Job, long Round)> _jobs = [];
    private readonly Stack<SendJob> _free = [];
    private long _round;
    private bool _isFull, _isComplete, _isAborted;

    /// <summary>Takes an empty job to fill.</summary>
    internal SendJob Rent()
    {
        lock (_gate) return _free.TryPop(out SendJob? job) ? job : new SendJob();
    }

    /// <summary>Gives a job back that has been sent.</summary>
    internal void Return(SendJob job)
    {
        job.State?.Dispose();
        (job.Block, job.State, job.Count) = (null, null, 0);
        lock (_gate) _free.Push(job);
    }

    /// <summary>Adds a job; waits while the queue is full.</summary>
    /// <returns>False when the attempt has ended; the job is still the caller's.</returns>
    internal bool Add(SendJob job)
    {
        lock (_gate)
        {
            while (_isFull && !_isAborted) Monitor.Wait(_gate);
            if (_isAborted || _isComplete) return false;
            _jobs.Enqueue((job, _round));
            _isFull = _jobs.Count >= _capacity;
            Monitor.Pulse(_gate);
            return true;
        }
    }

    /// <summary>Makes every channel send a SYNC behind the jobs that were added so far.</summary>
    internal void Sync()
    {
        lock (_gate)
        {
            _round++;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Waits for what a channel does next.</summary>
    /// <param name="round">SYNCs that the channel has sent; counted up with each.</param>
    /// <param name="job">The job to send and to <see cref="Return"/>.</param>
    /// <exception cref="OperationCanceledException">The attempt has ended.</exception>
    internal SendStep Take(ref long round, out SendJob? job)
    {
        job = null;
        lock (_gate)
        {
            while (true)
            {
                if (_isAborted) throw new OperationCanceledException();
                bool any = _jobs.TryPeek(out (SendJob Job, long Round) next);
                if (round < (any ? next.Round : _round))
                {
                    round++;
                    return SendStep.Sync;
                }
                if (any)
                {
                    job = _jobs.Dequeue().Job;
                    if (_isFull && _jobs.Count <= _capacity / 2)
                    {
                        _isFull = false;
                        Monitor.PulseAll(_gate);
                    }
                    return SendStep.Job;
                }
                if (_isComplete) return SendStep.End;
                Monitor.Wait(_gate);
            }
        }
    }

    /// <summary>Says that no more jobs come.</summary>
    internal void Complete()
    {
        lock (_gate)
        {
            _isComplete = true;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Ends all waits and drops the jobs.</summary>
    internal void Abort()
    {
        lock (_gate)
        {
            _isAborted = true;
            foreach ((SendJob job, _) in _jobs) job.State?.Dispose();
            _jobs.Clear();
            Monitor.PulseAll(_gate);
        }
    }
}
