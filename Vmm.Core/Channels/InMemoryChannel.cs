using Vmm.Core.Buffers;
using Vmm.Core.Errors;

namespace Vmm.Core.Channels;

/// <summary>One end of a pair of channels inside one process; each direction is a bounded ring of bytes. For embedding and tests. Thread-safe.</summary>
public sealed class InMemoryChannel : IMigrationChannel
{
    private readonly Ring _in;
    private readonly Ring _out;

    private InMemoryChannel(string name, Ring input, Ring output)
    {
        Name = name;
        _in = input;
        _out = output;
    }

    /// <inheritdoc/>
    public string Name { get; }

    /// <inheritdoc/>
    public bool IsBidirectional => true;

    /// <summary>Makes two connected ends.</summary>
    /// <param name="capacityBytes">Bytes that one direction holds, at least 1; a writer waits while it is full.</param>
    public static (InMemoryChannel Source, InMemoryChannel Destination) CreatePair(int capacityBytes = 1 << 20)
    {
        var forward = new Ring(capacityBytes);
        var back = new Ring(capacityBytes);
        return (new InMemoryChannel("memory:source", back, forward), new InMemoryChannel("memory:destination", forward, back));
    }

    /// <inheritdoc/>
    public int Read(Span<byte> destination) => _in.Read(destination, Name);

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> source) => _out.Write(source, Name);

    /// <inheritdoc/>
    public void WriteGather(GatherList parts)
    {
        ArgumentNullException.ThrowIfNull(parts);
        try
        {
            for (int i = 0; i < parts.Count; i++) _out.Write(parts.Segment(i), Name);
        }
        finally
        {
            parts.Clear();
        }
    }

    /// <inheritdoc/>
    public void Shutdown(ChannelShutdown how)
    {
        if ((how & ChannelShutdown.Write) != 0) _out.Close();
        if ((how & ChannelShutdown.Read) != 0) _in.Break();
    }

    /// <inheritdoc/>
    public bool Drain(TimeSpan timeout) => _out.WaitEmpty(timeout);

    /// <inheritdoc/>
    public bool PeerHasClosed => _in.IsClosedAndEmpty;

    /// <summary>Ends both directions.</summary>
    public void Dispose() => Shutdown(ChannelShutdown.Both);

    private sealed class Ring(int capacity)
    {
        private readonly byte[] _bytes = new byte[capacity];
        private int _start;
        private int _count;
        private bool _closed;
        private bool _broken;

        internal bool IsClosedAndEmpty
        {
            get { lock (_bytes) return _closed && _count == 0; }
        }

        internal int Read(Span<byte> into, string name)
        {
            lock (_bytes)
            {
                while (_count == 0 && !_closed && !_broken) Monitor.Wait(_bytes);
                if (_broken) throw new ChannelException($"{name}: the channel was shut down", Errno.ECANCELED);
                int n = Math.Min(Math.Min(into.Length, _count), _bytes.Length - _start);
                _bytes.AsSpan(_start, n).CopyTo(into);
                _start = (_start + n) % _bytes.Length;
                _count -= n;
                Monitor.PulseAll(_bytes);
                return n;
            }
        }

        internal void Write(ReadOnlySpan<byte> from, string name)
        {
            while (from.Length > 0)
            {
                lock (_bytes)
                {
                    while (_count == _bytes.Length && !_closed && !_broken) Monitor.Wait(_bytes);
                    if (_closed || _broken) throw new ChannelException($"{name}: the other end is closed", Errno.EPIPE);
                    int at = (_start + _count) % _bytes.Length;
                    int n = Math.Min(Math.Min(from.Length, _bytes.Length - _count), _bytes.Length - at);
                    from[..n].CopyTo(_bytes.AsSpan(at));
                    from = from[n..];
                    _count += n;
                    Monitor.PulseAll(_bytes);
                }
            }
        }

        internal void Close()
        {
            lock (_bytes) { _closed = true; Monitor.PulseAll(_bytes); }
        }

        internal void Break()
        {
            lock (_bytes) { _broken = true; Monitor.PulseAll(_bytes); }
        }

        internal bool WaitEmpty(TimeSpan timeout)
        {
            long deadline = Environment.TickCount64 + (long)timeout.TotalMilliseconds;
            lock (_bytes)
            {
                while (_count > 0 && !_broken)
                {
                    long left = deadline - Environment.TickCount64;
                    if (left <= 0 || !Monitor.Wait(_bytes, (int)left)) return false;
                }
                return _count == 0; // A reader that closed after it took everything has received all.
            }
        }
    }
}
