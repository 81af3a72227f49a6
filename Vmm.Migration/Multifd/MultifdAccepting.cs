using System.Buffers.Binary;
using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Accepts the connections of one incoming migration: a main channel and, with multifd, others, in any order. Their first four bytes tell which is which
/// (stream 14.3). Dispose closes connections that were not handed on.
/// </summary>
/// <param name="listener">Accepts them.</param>
/// <param name="isOn">Says whether capability multifd is on; called for each connection, because it may be switched on after the listening began.</param>
internal sealed class MultifdAccepting(MigrationListener listener, Func<bool> isOn) : IDisposable
{
    private const int FirstBytesTimeoutMs = 10_000;

    /// <summary>
    /// Longest time from one connection of a set to the next. A source from 9.0 on connects all of them before its first byte on the main channel; those of an
    /// older one come within a few round trips.
    /// </summary>
    private static readonly TimeSpan s_nextTimeout = TimeSpan.FromSeconds(5);

    private readonly List<SocketChannel> _data = [];
    private SocketChannel? _main;
    private int _surplus;
    private long _lastAt;

    /// <summary>Waits for all connections of a set; once one has come, the others have a deadline.</summary>
    /// <param name="main">The main channel.</param>
    /// <param name="data">The channels of multifd.</param>
    /// <param name="refusal">Why this set must not be loaded: the source opened more or fewer channels. Null for a good set.</param>
    /// <returns>False when the listener was stopped.</returns>
    internal bool TryAccept([NotNullWhen(true)] out SocketChannel? main, out IReadOnlyList<SocketChannel> data, out Exception? refusal)
    {
        (main, data, refusal) = (null, [], null);
        while (_main is null || (isOn() && _data.Count < MultifdPacket.Channels))
        {
            SocketChannel? peer = listener.Accept(LeftMs(), out bool timedOut);
            if (timedOut && _main is null)
            {
                // Without a main channel these belong to no migration.
                Close();
                continue;
            }
            if (timedOut) break;
            if (peer is null) return false;
            // Without multifd the only connection is the main channel; the stream's reader checks its first bytes.
            bool isMultifd = isOn() && IsMultifd(peer);
            bool isNew = isMultifd ? _data.Count < MultifdPacket.Channels : _main is null;
            if (isNew) _lastAt = Stopwatch.GetTimestamp();
            else if (isMultifd) _surplus++;
            if (isNew && isMultifd) _data.Add(peer);
            else if (isNew) _main = peer;
            else peer.Dispose();
        }
        if (_surplus > 0) refusal = ChannelCount.Refusal(_data.Count + _surplus, MultifdPacket.Channels);
        else if (isOn() && _data.Count < MultifdPacket.Channels) refusal = ChannelCount.Refusal(_data.Count, MultifdPacket.Channels, s_nextTimeout);
        (main, data) = (_main!, [.. _data]);
        _main = null;
        _data.Clear();
        return true;
    }

    public void Dispose() => Close();

    private void Close()
    {
        _main?.Dispose();
        _data.ForEach(static c => c.Dispose());
        _main = null;
        _data.Clear();
        _surplus = 0;
    }

    private int LeftMs() => _main is null && _data.Count == 0 ? -1
        : (int)Math.Max(0, Math.Ceiling((s_nextTimeout - Stopwatch.GetElapsedTime(_lastAt)).TotalMilliseconds));

    private static bool IsMultifd(SocketChannel peer)
    {
        Span<byte> first = stackalloc byte[4];
        return peer.PeekFirst(first, FirstBytesTimeoutMs) && BinaryPrimitives.ReadUInt32BigEndian(first) == MultifdPacket.Magic;
    }
}
