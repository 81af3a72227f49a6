using System.Diagnostics;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Watches the lobby while a migration loads. A channel of multifd that the source opened and nothing here reads refuses the load at once. All other
/// connections, and all that come after the source has gone, belong to other peers and wait for the next attempt.
/// </summary>
internal sealed class ConnectionWatch : IDisposable
{
    /// <summary>
    /// A source opens all its channels at once. This is how long the watch counts them before it refuses, so that the error names their number.
    /// </summary>
    private const int SettleMs = 100;

    /// <summary>
    /// A channel whose id the load has already belongs to another source. If it came with those that the load has, the two sources' channels may be mixed up.
    /// </summary>
    private static readonly TimeSpan s_together = TimeSpan.FromSeconds(1);

    private readonly ConnectionLobby _lobby;
    private readonly int _expected;
    private readonly Func<bool> _sourceHasGone;
    private readonly Action<Exception> _refuse;
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly HashSet<WaitingConnection> _seen = [];
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private readonly Task _thread;
    private WaitingConnection[] _surplus = [];
    private long _firstAt;
    private volatile Exception? _found;
    private volatile bool _ended;

    /// <summary>Starts the thread.</summary>
    /// <param name="lobby">The lobby that had the source's connections; nobody else uses it meanwhile.</param>
    /// <param name="expected">Channels of multifd that the load reads; 0 without multifd.</param>
    /// <param name="sourceHasGone">Says whether the peer of the main channel has closed it, as a source does before it tries again.</param>
    /// <param name="refuse">Called once with the error, on the watch's thread.</param>
    internal ConnectionWatch(ConnectionLobby lobby, int expected, Func<bool> sourceHasGone, Action<Exception> refuse)
    {
        (_lobby, _expected, _sourceHasGone, _refuse) = (lobby, expected, sourceHasGone, refuse);
        _thread = WorkerThread.Run("mig/dst/watch", Run);
    }

    /// <summary>Throws the refusal if a surplus channel was found, even before all of them are counted.</summary>
    internal void ThrowIfSurplus()
    {
        if (_found is { } found) throw found;
    }

    /// <summary>
    /// Waits a moment for a surplus channel, when something that it explains has failed already: the connection may have come and not been looked at yet.
    /// </summary>
    /// <returns>The refusal, or null.</returns>
    internal Exception? WaitForSurplus()
    {
        SpinWait.SpinUntil(() => _found is not null, TimeSpan.FromMilliseconds(500));
        return _found;
    }

    /// <summary>Looks a last time, before the main channel is shut: after that nobody can tell whether the source has gone.</summary>
    internal void LookOnceMore()
    {
        End();
        using OwnedFd never = Posix.EventFd();
        _lobby.Wait(never, 0);
        FindSurplus();
    }

    /// <summary>After a failed load: reads the surplus channels until the source has closed them (<see cref="ChannelDiscard"/>).</summary>
    internal void DiscardSurplus() => ChannelDiscard.ReadToEndAndClose([.. _surplus.Intersect(_lobby.Waiting).ToArray().Select(_lobby.Take)]);

    /// <summary>Ends the thread and closes surplus channels; the other connections stay in the lobby.</summary>
    public void Dispose()
    {
        End();
        foreach (WaitingConnection one in _surplus.Intersect(_lobby.Waiting).ToArray()) _lobby.Drop(one);
        _wake.Dispose();
    }

    private void End()
    {
        _ended = true;
        Posix.SignalEventFd(_wake);
        _thread.GetAwaiter().GetResult();
    }

    private void Run()
    {
        while (!_ended)
        {
            FindSurplus();
            int leftMs = _surplus.Length == 0 ? -1 : (int)Math.Max(0, SettleMs - Stopwatch.GetElapsedTime(_firstAt).TotalMilliseconds);
            if (leftMs == 0)
            {
                _refuse(_found!);
                return;
            }
            if (!_lobby.Wait(_wake, leftMs)) return;
        }
    }

    private void FindSurplus()
    {
        // A channel that comes after the source has gone stays another peer's for good, so each is judged when it comes. One that another main channel turns out to
        // go with is judged again.
        foreach (WaitingConnection one in _lobby.Waiting)
        {
            if (one.Kind != ConnectionKind.Data || !_seen.Add(one) || !MayBeOfSource(one) || _sourceHasGone()) continue;
            if (_surplus.Length == 0) _firstAt = Stopwatch.GetTimestamp();
            _surplus = [.. _surplus, one];
        }
        _surplus = [.. _surplus.Intersect(_lobby.Waiting).Where(MayBeOfSource)];
        _found = _surplus.Length == 0 ? null
            : ChannelCount.Refusal(Math.Max(_expected + _surplus.Length, _surplus.Max(static c => c.Id) + 1), _expected);
    }

    /// <summary>False for a channel that goes with another main channel, and for one whose id the load had long before.</summary>
    private bool MayBeOfSource(WaitingConnection one) => MultifdAccepting.MainOf(one, _lobby.Waiting) is null
        && (one.Id >= _expected || Stopwatch.GetElapsedTime(_startedAt, one.AcceptedAt) <= s_together);
}
