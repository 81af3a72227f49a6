using Nito.AsyncEx;

namespace Vmm.Migration.Qmp;

/// <summary>
/// What is still to be written to one client, bounded. Events never wait: they come from threads that hold the BQL, so a client that does not
/// read loses its connection instead. Answers wait for room. Thread-safe.
/// </summary>
internal sealed class QmpOutbox(IQmpTransport transport)
{
    internal const int MaxMessages = 1024, MaxBytes = 16 << 20;

    private readonly Lock _gate = new();
    private readonly Queue<byte[]> _queue = new();
    private readonly AsyncManualResetEvent _work = new(), _room = new(set: true), _idle = new(set: true);
    private int _bytes;
    private bool _completed;

    /// <summary>Adds an event; false when there is no room for it. After <see cref="Complete"/> it is dropped, which is no failure.</summary>
    internal bool TryPostEvent(byte[] line)
    {
        lock (_gate) return _completed || (HasRoom && Add(line));
    }

    /// <summary>Adds an answer, waiting for room; dropped after <see cref="Complete"/>.</summary>
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

    /// <summary>Completes when all that was added has been handed to the operating system, or cannot be.</summary>
    internal Task FlushAsync() => _idle.WaitAsync();

    /// <summary>Nothing more is added; the writer ends once the queue is empty.</summary>
    internal void Complete()
    {
        lock (_gate)
        {
            _completed = true;
            _work.Set();
            _room.Set();
        }
    }

    /// <summary>Writes what is added until <see cref="Complete"/> or the end of the connection.</summary>
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
