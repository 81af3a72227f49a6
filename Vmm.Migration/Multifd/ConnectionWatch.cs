using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Watches the listener while a migration loads. A connection that starts like a multifd channel comes from the source, and nothing here reads it, so the
/// watch refuses the load at once. All other connections, and all that come after the source has gone, belong to other peers: the listener gets them back
/// in order when the watch is disposed.
/// </summary>
internal sealed class ConnectionWatch : IDisposable
{
    /// <summary>
    /// A source opens all its channels at once. This is how long the watch counts them before it refuses, so that the error names their number.
    /// </summary>
    private const int SettleMs = 100;

    /// <summary>Interval at which the watch looks at connections that have sent nothing yet.</summary>
    private const int PollMs = 10;

    /// <summary>Most connections that the watch accepts; further ones wait in the kernel's queue.</summary>
    private const int MaxKept = 64;

    private readonly MigrationListener _listener;
    private readonly int _expected;
    private readonly Func<bool> _sourceHasGone;
    private readonly Action<Exception> _refuse;
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly List<SocketChannel> _undecided = [], _foreign = [], _surplus = [];
    private readonly Task _thread;
    private int _opened;
    private long _firstAt;
    private volatile Exception? _found;
    private volatile bool _ended;

    /// <summary>Starts the thread.</summary>
    /// <param name="listener">The listener that accepted the source's connections; nobody else accepts meanwhile.</param>
    /// <param name="expected">Channels of multifd that the load reads; 0 without multifd.</param>
    /// <param name="sourceHasGone">Says whether the peer of the main channel has closed it, as a source does before it tries again.</param>
    /// <param name="refuse">Called once with the error, on the watch's thread.</param>
    internal ConnectionWatch(MigrationListener listener, int expected, Func<bool> sourceHasGone, Action<Exception> refuse)
    {
        (_listener, _expected, _sourceHasGone, _refuse) = (listener, expected, sourceHasGone, refuse);
        _opened = expected;
        _thread = WorkerThread.Run("mig/dst/watch", Run);
    }

    /// <summary>Throws the refusal if a surplus channel was found, even before all of them are counted.</summary>
    internal void ThrowIfSurplus()
    {
        if (_found is { } found) throw found;
    }

    /// <summary>Ends the thread, closes surplus channels and gives the other connections back to the listener.</summary>
    public void Dispose()
    {
        _ended = true;
        Posix.SignalEventFd(_wake);
        _thread.GetAwaiter().GetResult();
        _surplus.ForEach(static c => c.Dispose());
        _foreign.AddRange(_undecided);
        _foreign.ForEach(_listener.GiveBack);
        _wake.Dispose();
    }

    private void Run()
    {
        while (!_ended)
        {
            bool pending = _undecided.Count > 0 || _surplus.Count > 0;
            bool isFull = _undecided.Count + _foreign.Count + _surplus.Count >= MaxKept;
            SocketChannel? peer = isFull ? null : _listener.AcceptOr(_wake, pending ? PollMs : -1);
            if (isFull) Posix.Poll(_wake, Posix.POLLIN, null, pending ? PollMs : -1, out _);
            if (peer is not null) _undecided.Add(peer);
            Sort();
            if (_surplus.Count == 0 || Stopwatch.GetElapsedTime(_firstAt).TotalMilliseconds < SettleMs) continue;
            _refuse(_found!);
            return;
        }
    }

    private void Sort()
    {
        for (int i = 0; i < _undecided.Count;)
        {
            SocketChannel peer = _undecided[i];
            if (!peer.WaitReadable(0)) { i++; continue; }
            _undecided.RemoveAt(i);
            if (!IsChannel(peer, out int id) || _sourceHasGone())
            {
                _foreign.Add(peer);
                continue;
            }
            if (_surplus.Count == 0) _firstAt = Stopwatch.GetTimestamp();
            _surplus.Add(peer);
            _opened = Math.Max(Math.Max(_opened, id + 1), _expected + _surplus.Count);
            _found = ChannelCount.Refusal(_opened, _expected);
        }
    }

    private static bool IsChannel(SocketChannel peer, out int id)
    {
        id = -1;
        Span<byte> first = stackalloc byte[MultifdPacket.PreambleIdOffset + 1];
        if (!peer.PeekFirst(first[..4], PollMs) || BinaryPrimitives.ReadUInt32BigEndian(first) != MultifdPacket.Magic) return false;
        if (peer.PeekFirst(first, PollMs)) id = first[^1];
        return true;
    }
}
