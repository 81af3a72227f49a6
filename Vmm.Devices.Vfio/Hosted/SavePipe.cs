using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// A bounded pipe between a hosted device's save code, which writes, and the session, which answers the client's reads from it. A state of any
/// size therefore needs little memory, unless <see cref="Lift"/> lets the writer go on without waiting. One writer, one reader.
/// </summary>
/// <param name="limitBytes">Most bytes that the writer may write in all.</param>
internal sealed class SavePipe(ulong limitBytes) : IMigrationChannel
{
    private readonly object _gate = new();
    private readonly Queue<byte[]> _parts = new();
    private int _partAt;
    private long _buffered;
    private ulong _total;
    private bool _isLifted, _isEnded, _isBroken;
    private Exception? _error;

    public string Name => "device state";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => _isBroken;

    /// <summary>Lets the writer go on without waiting, up to the limit, because it holds a lock that another thread needs.</summary>
    internal void Lift()
    {
        lock (_gate)
        {
            _isLifted = true;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Called by the writer at its end, with its error if it failed.</summary>
    internal void End(Exception? error)
    {
        lock (_gate)
        {
            (_isEnded, _error) = (true, error);
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Called by the reader when it wants no more: the writer is cancelled.</summary>
    internal void Break()
    {
        lock (_gate)
        {
            _isBroken = true;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Waits for some bytes.</summary>
    /// <returns>0 at the end.</returns>
    /// <exception cref="VmmException">The writer failed.</exception>
    public int Read(Span<byte> destination)
    {
        lock (_gate)
        {
            while (_parts.Count == 0 && !_isEnded) Monitor.Wait(_gate);
            if (_error is not null) throw _error as VmmException ?? new DeviceStateException($"the device failed to save: {_error.Message}", _error);
            int have = 0;
            while (have < destination.Length && _parts.TryPeek(out byte[]? part))
            {
                int n = Math.Min(destination.Length - have, part.Length - _partAt);
                part.AsSpan(_partAt, n).CopyTo(destination[have..]);
                (have, _partAt, _buffered) = (have + n, _partAt + n, _buffered - n);
                if (_partAt < part.Length) break;
                _parts.Dequeue();
                _partAt = 0;
            }
            Monitor.PulseAll(_gate);
            return have;
        }
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            ReadOnlySpan<byte> part = source[..Math.Min(source.Length, VfioUserLimits.StatePipeBytes)];
            source = source[part.Length..];
            lock (_gate)
            {
                _total += (uint)part.Length;
                if (_total > limitBytes) throw new StreamLimitException($"device state is over its limit of {limitBytes} bytes");
                while (!_isBroken && !_isLifted && _buffered >= VfioUserLimits.StatePipeBytes) Monitor.Wait(_gate);
                if (_isBroken) throw new OperationCanceledException("the client reads no more");
                _parts.Enqueue(part.ToArray());
                _buffered += part.Length;
                Monitor.PulseAll(_gate);
            }
        }
    }

    public void WriteGather(GatherList parts)
    {
        ArgumentNullException.ThrowIfNull(parts);
        try
        {
            for (int i = 0; i < parts.Count; i++) Write(parts.Segment(i));
        }
        finally
        {
            parts.Clear();
        }
    }

    public void Shutdown(ChannelShutdown how) => Break();

    public bool Drain(TimeSpan timeout) => false;

    public void Dispose() => Break();
}
