using System.Diagnostics;
using Vmm.Core.Interop;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>The connections of one incoming migration.</summary>
/// <param name="Main">The main channel.</param>
/// <param name="Data">The channels of multifd, in the order of their ids.</param>
/// <param name="Refusal">Why this set must not be loaded: the source opened more or fewer channels. Null for a good set.</param>
internal sealed record ChannelSet(SocketChannel Main, IReadOnlyList<SocketChannel> Data, Exception? Refusal);

/// <summary>
/// Waits for the connections of one incoming migration: a main channel and, with multifd, others, in any order (stream 14.3). The main channel begins the
/// attempt; all connections without one cost nothing.
/// </summary>
/// <param name="lobby">Has the connections.</param>
/// <param name="stopped">Ends the wait.</param>
/// <param name="channels">Says how many channels of multifd are expected, 0 while it is off; called often, because it may be set after the listening began.</param>
internal sealed class MultifdAccepting(ConnectionLobby lobby, OwnedFd stopped, Func<int> channels)
{
    /// <summary>
    /// Longest time from one connection of a set to the next. A source from 9.0 on connects all of them before its first byte on the main channel; those of an
    /// older one come within a few round trips.
    /// </summary>
    internal static readonly TimeSpan NextTimeout = TimeSpan.FromSeconds(5);

    private static readonly TimeSpan s_settle = TimeSpan.FromMilliseconds(200);

    /// <summary>
    /// Tells which main channel a channel of multifd goes with. A source connects its main channel first, so it is the last one that came before; a channel
    /// without one may have overtaken its main channel on a bad network.
    /// </summary>
    /// <returns>The main channel; null if none that waits can be meant.</returns>
    internal static WaitingConnection? MainOf(WaitingConnection data, IReadOnlyList<WaitingConnection> waiting)
    {
        WaitingConnection? before = waiting.LastOrDefault(c => c.Kind == ConnectionKind.Main && c.Key < data.Key);
        return before ?? waiting.FirstOrDefault(c => c.Kind == ConnectionKind.Main && Stopwatch.GetElapsedTime(data.AcceptedAt, c.AcceptedAt) <= NextTimeout);
    }

    /// <summary>Waits for all connections of a set; once the main channel has come, the others have a deadline.</summary>
    /// <returns>The set; null when the listener was stopped.</returns>
    internal ChannelSet? Accept()
    {
        for (int waitMs = 0; lobby.Wait(stopped, waitMs);)
        {
            waitMs = -1;
            foreach (WaitingConnection main in lobby.Waiting.Where(static c => c.Kind == ConnectionKind.Main))
            {
                int expected = channels();
                if (expected == 0) return Take(main, [], 0, null);
                List<WaitingConnection> data = ChannelsOf(main, expected, out bool isAmbiguous);
                int opened = Math.Max(data.Count, data.Count == 0 ? 0 : data.Max(static c => c.Id) + 1);
                int left = LeftMs(main, data, NextTimeout);
                if (!isAmbiguous && data.Count(c => c.Id < expected) == expected)
                {
                    left = IsContested(main, data) ? LeftMs(main, data, s_settle) : 0;
                    // A source that was stopped while it connected may have closed one channel before it opened the next, so its set was never whole.
                    if (left == 0 && !lobby.AreHere([main, .. data]))
                    {
                        waitMs = 0;
                        break;
                    }
                    if (left == 0) return Take(main, data, expected, opened > expected ? ChannelCount.Refusal(opened, expected) : null);
                }
                if (left == 0)
                    return Take(main, data, expected, isAmbiguous ? ChannelCount.Refusal(opened, expected) : ChannelCount.Refusal(data.Count, expected, NextTimeout));
                waitMs = waitMs < 0 ? left : Math.Min(waitMs, left);
            }
        }
        return null;
    }

    /// <summary>
    /// The channels that go with a main channel. Those that came before it count only if not all stand behind it: usually they are left over from a source
    /// that was stopped while it connected.
    /// </summary>
    /// <param name="main">The main channel.</param>
    /// <param name="expected">How many there must be.</param>
    /// <param name="isAmbiguous">True if two have the same id, because two sources connect at the same time. They must never be mixed.</param>
    private List<WaitingConnection> ChannelsOf(WaitingConnection main, int expected, out bool isAmbiguous)
    {
        List<WaitingConnection> own = [.. lobby.Waiting.Where(c => c.Kind == ConnectionKind.Data && MainOf(c, lobby.Waiting) == main)];
        bool allBehind = Enumerable.Range(0, expected).All(id => own.Exists(c => c.Id == id && c.Key > main.Key));
        List<WaitingConnection> meant = [.. own.Where(c => c.Key > main.Key || !(allBehind || own.Exists(later => later.Id == c.Id && later.Key > main.Key)))];
        isAmbiguous = meant.GroupBy(static c => c.Id).Any(static same => same.Count() > 1);
        return meant;
    }

    /// <summary>
    /// True if a connection that came after the main channel and before one of the others is undecided: it may be the main channel of another source, whose header
    /// comes a moment after its channels.
    /// </summary>
    private bool IsContested(WaitingConnection main, List<WaitingConnection> data) =>
        lobby.Waiting.Any(c => c.Kind == ConnectionKind.Undecided && c.Key > main.Key && c.Key < data.Max(static d => d.Key));

    private static int LeftMs(WaitingConnection main, List<WaitingConnection> data, TimeSpan limit)
    {
        long last = data.Aggregate(main.DecidedAt, static (at, c) => Math.Max(at, c.DecidedAt));
        return (int)Math.Max(0, Math.Ceiling((limit - Stopwatch.GetElapsedTime(last)).TotalMilliseconds));
    }

    /// <summary>
    /// Takes a set out of the lobby. What an earlier source left there goes. Channels that came after the main channel and that nobody reads stay for the watch of the
    /// load, which refuses it.
    /// </summary>
    private ChannelSet Take(WaitingConnection main, List<WaitingConnection> data, int expected, Exception? refusal)
    {
        WaitingConnection[] chosen = [.. data.Where(c => c.Id < expected).DistinctBy(static c => c.Id).OrderBy(static c => c.Id)];
        WaitingConnection[] stale = [.. lobby.Waiting.Where(c => c.Kind == ConnectionKind.Data && c.Key < main.Key && IsStale(c))];
        foreach (WaitingConnection one in stale) lobby.Drop(one);
        return new ChannelSet(lobby.Take(main), [.. chosen.Select(lobby.Take)], refusal);

        bool IsStale(WaitingConnection c) => !chosen.Contains(c) && (MainOf(c, lobby.Waiting) ?? main) == main;
    }
}
