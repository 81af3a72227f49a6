using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Accepts every connection of a listener at once and keeps it until its first bytes tell what it is (stream 14.3). So a connection that says nothing holds
/// nobody up, and one that says something else, or goes away again, is no attempt. Nothing is read here; the load that takes a connection reads it from its
/// first byte. The accept phase and the watch of a load use it in turn; for one thread at a time.
/// </summary>
internal sealed class ConnectionLobby : IDisposable
{
    /// <summary>
    /// Most connections that wait; fewer where a quarter of the descriptors that this process may have is less. When more come, those go first that have waited
    /// longest and are no main channels.
    /// </summary>
    internal const int MaxWaiting = 512;

    /// <summary>
    /// Longest wait for the first bytes of a connection, and for the main channel of a channel of multifd. It is long, because a source may prepare its devices
    /// before it sends a byte, and because the wait costs nothing but a descriptor.
    /// </summary>
    internal static readonly TimeSpan DecisionTimeout = TimeSpan.FromSeconds(60);

    /// <summary>How long to leave the listener alone after the kernel refused to accept, mostly for want of descriptors.</summary>
    private const int PauseMs = 100;

    private const int Warnings = 10;

    private readonly MigrationListener _listener;
    private readonly byte[] _header;
    private readonly ILogger _logger;
    private readonly List<WaitingConnection> _waiting = [];
    private readonly ulong[] _ready = new ulong[64];
    private readonly int _room = (int)Math.Clamp(Posix.MaxOpenFiles / 4, 8, MaxWaiting);
    private readonly TimeSpan _decisionTimeout;
    private ulong _lastKey;
    private bool _accepts;
    private long _pausedAt;
    private int _foreign;

    /// <summary>Makes a lobby, which accepts whenever somebody waits in it.</summary>
    /// <param name="listener">Not owned.</param>
    /// <param name="header">The header of every stream.</param>
    /// <param name="logger">Learns of connections that are closed here.</param>
    /// <param name="decisionTimeout">Another <see cref="DecisionTimeout"/>, for tests.</param>
    internal ConnectionLobby(MigrationListener listener, byte[] header, ILogger logger, TimeSpan? decisionTimeout = null)
    {
        (_listener, _header, _logger, _decisionTimeout) = (listener, header, logger, decisionTimeout ?? DecisionTimeout);
        // Keys of connections follow those of the sockets.
        _lastKey = (ulong)listener.Sockets.Count;
    }

    /// <summary>All connections that wait, in the order of their arrival.</summary>
    internal IReadOnlyList<WaitingConnection> Waiting => _waiting;

    /// <summary>Waits until something may have changed, the time is over (-1: no limit), or <paramref name="wake"/> is readable.</summary>
    /// <returns>False if <paramref name="wake"/> is readable.</returns>
    internal bool Wait(OwnedFd wake, int timeoutMs)
    {
        bool paused = _pausedAt != 0 && Stopwatch.GetElapsedTime(_pausedAt).TotalMilliseconds < PauseMs;
        SetAccepting(!paused && HasRoom);
        int ready = _listener.Events.Wait(_ready, wake, Shortest(timeoutMs, paused ? PauseMs : -1, ExpiryMs()), out bool woken);
        // Also when woken: an edge is told once, so an event that is left out here would never come again.
        foreach (ulong key in _ready.AsSpan(0, ready))
        {
            if (key < (ulong)_listener.Sockets.Count) Accept(_listener.Sockets[(int)key]);
            else if (_waiting.Find(c => c.Key == key) is { } connection) Look(connection);
        }
        Expire();
        return !woken;
    }

    /// <summary>Looks at connections whose end may have come and not been seen yet, and closes those whose peer has given them up.</summary>
    /// <returns>True if all are still here.</returns>
    internal bool AreHere(IReadOnlyList<WaitingConnection> connections)
    {
        foreach (WaitingConnection one in connections) Look(one);
        return connections.All(_waiting.Contains);
    }

    /// <summary>Hands a connection to the caller, who owns it from now on.</summary>
    internal SocketChannel Take(WaitingConnection connection)
    {
        Forget(connection);
        return connection.Channel;
    }

    /// <summary>Closes a connection.</summary>
    internal void Drop(WaitingConnection connection)
    {
        Forget(connection);
        connection.Channel.Dispose();
    }

    /// <summary>Closes all connections that wait.</summary>
    public void Dispose()
    {
        foreach (WaitingConnection connection in _waiting) connection.Channel.Dispose();
        _waiting.Clear();
    }

    /// <summary>True if another connection can wait, at least in place of one that has no claim yet.</summary>
    private bool HasRoom => _waiting.Count < _room || _waiting.Exists(static c => c.Kind != ConnectionKind.Main);

    private void Accept(OwnedFd socket)
    {
        // One round takes a limited number, so that the first bytes of those that came before get their turn.
        for (int i = 0; i < _ready.Length; i++)
        {
            if (!HasRoom) return;
            SocketChannel? peer = _listener.TryAccept(socket, out Errno errno);
            if (peer is null)
            {
                if (errno == Errno.EAGAIN) return;
                MigrationLog.CannotAccept(_logger, Posix.Describe(errno));
                // Without a descriptor left, the room has to come from here.
                if (errno == Errno.EMFILE && DropOldest()) continue;
                _pausedAt = Stopwatch.GetTimestamp();
                return;
            }
            if (_waiting.Count >= _room) DropOldest();
            var connection = new WaitingConnection(peer, ++_lastKey);
            _listener.Events.AddEdges(peer.Descriptor!, connection.Key);
            _waiting.Add(connection);
            Look(connection);
        }
    }

    private void Look(WaitingConnection connection)
    {
        bool isHere = connection.Look(_header);
        if (connection.Kind == ConnectionKind.Foreign)
        {
            if (++_foreign <= Warnings) MigrationLog.ForeignConnection(_logger, connection.Channel.Name, connection.FirstBytes);
            Drop(connection);
        }
        else if (!isHere)
        {
            MigrationLog.ConnectionDropped(_logger, connection.Channel.Name, "its peer has ended it");
            Drop(connection);
        }
    }

    /// <summary>Closes the connection that has waited longest and is no main channel.</summary>
    /// <returns>False if only main channels wait.</returns>
    private bool DropOldest()
    {
        while (_waiting.Find(static c => c.Kind != ConnectionKind.Main) is { } oldest)
        {
            // Its bytes may have come, and their event not been seen yet.
            Look(oldest);
            if (!_waiting.Contains(oldest)) return true;
            if (oldest.Kind == ConnectionKind.Main) continue;
            MigrationLog.ConnectionDropped(_logger, oldest.Channel.Name, "it has waited longest, and more connections come than can wait");
            Drop(oldest);
            return true;
        }
        return false;
    }

    /// <summary>A connection expires that never says what it is; so does a channel whose main channel never comes.</summary>
    private bool CanExpire(WaitingConnection connection) =>
        connection.Kind == ConnectionKind.Undecided || (connection.Kind == ConnectionKind.Data && !_waiting.Exists(static c => c.Kind == ConnectionKind.Main));

    private int ExpiryMs() => _waiting.Find(CanExpire) is { } first
        ? (int)Math.Max(0, Math.Ceiling((_decisionTimeout - Stopwatch.GetElapsedTime(first.AcceptedAt)).TotalMilliseconds)) : -1;

    private void Expire()
    {
        while (ExpiryMs() == 0)
        {
            WaitingConnection expired = _waiting.Find(CanExpire)!;
            MigrationLog.ConnectionDropped(_logger, expired.Channel.Name, $"nothing came on it for {_decisionTimeout.TotalSeconds:0.#} s");
            Drop(expired);
        }
    }

    private void Forget(WaitingConnection connection)
    {
        _waiting.Remove(connection);
        _listener.Events.Remove(connection.Channel.Descriptor!);
    }

    private void SetAccepting(bool on)
    {
        if (on == _accepts) return;
        _accepts = on;
        for (int i = 0; i < _listener.Sockets.Count; i++)
        {
            if (on) _listener.Events.Add(_listener.Sockets[i], (ulong)i);
            else _listener.Events.Remove(_listener.Sockets[i]);
        }
    }

    private static int Shortest(params ReadOnlySpan<int> timeouts)
    {
        int shortest = -1;
        foreach (int one in timeouts)
            if (one >= 0 && (shortest < 0 || one < shortest)) shortest = one;
        return shortest;
    }
}
