using Nito.AsyncEx;

namespace Vmm.Migration.Qmp;

/// <summary>
/// The bounded queue of lines to write to one client. Answers wait for room. Events never wait, because they come from threads that hold the BQL; the
/// session disconnects a client that leaves no room for an event. Thread-safe.
/// </summary>
internal sealed class QmpOutbox(IQmpTransport transport)
{
    internal const int MaxMessages = 1024, MaxBytes = 16 << 20;

    private readonly Lock _gate = new();
    private readonly Queue<byte[]> _queue = new();
    private readonly AsyncManualResetEvent _work = new(), _room = new(set: true), _idle = new(set: true);
    private int _bytes;
    private bool _completed;

    /// <summary>True while there is no room for another line.</summary>
    internal bool IsFull
    {
        get { lock (_gate) return !HasRoom; }
    }

    /// <summary>Adds an event; false when there is no room. After <see cref="Complete"/> it drops the event and returns true.</summary>
    internal bool TryPostEvent(byte[] line)
    {
        lock (_gate) return _completed || (HasRoom && Add(line));
    }

    /// <summary>Waits for room and adds an answer; after <see cref="Complete"/> it drops the answer.</summary>
    internal async Task PostAnswerAsync(byte[] line)
    {
        while (true)
        {
            lock (_gate)
            {
                if (_completed || (HasRoom && Add(line))) return;
                _room.Reset();
            }
            await _room.WaitAsync().ConfigureAwait(false);
        }
    }

    /// <summary>Completes when every added line has been given to the kernel or dropped.</summary>
    internal Task FlushAsync() => _idle.WaitAsync();

    /// <summary>Closes the queue for further lines; the writer ends once the queue is empty.</summary>
    internal void Complete()
    {
        lock (_gate)
        {
            _completed = true;
            _work.Set();
            _room.Set();
        }
    }

    /// <summary>Writes the added lines until <see cref="Complete"/> or the end of the connection.</summary>
    internal async Task WriteAsync()
    {
        while (true)
        {
            await _work.WaitAsync().ConfigureAwait(false);
            byte[]? line;
            lock (_gate)
            {
                if (!_queue.TryDequeue(out line))
                {
                    _idle.Set();
                    if (_completed) return;
                    _work.Reset();
                    continue;
                }
                _bytes -= line.Length;
                _room.Set();
            }
            if (await transport.WriteAsync(line).ConfigureAwait(false)) continue;
            lock (_gate)
            {
                _queue.Clear();
                _bytes = 0;
            }
            Complete();
        }
    }

    private bool HasRoom => _queue.Count < MaxMessages && _bytes < MaxBytes;

    private bool Add(byte[] line)
    {
        _queue.Enqueue(line);
        _bytes += line.Length;
        _idle.Reset();
        _work.Set();
        return true;
    }
}
