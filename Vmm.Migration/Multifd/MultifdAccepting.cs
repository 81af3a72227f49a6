using System.Buffers.Binary;
using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Takes the connections of one incoming migration: a main channel and, with multifd, others, told apart by their first four bytes and in any
/// order (stream 14.3). What is not handed on is closed on dispose.
/// </summary>
/// <param name="listener">Where they come in.</param>
/// <param name="isOn">Whether capability multifd is on; asked at each connection, since it may be switched on after the listening began.</param>
internal sealed class MultifdAccepting(MigrationListener listener, Func<bool> isOn) : IDisposable
{
    private const int FirstBytesTimeoutMs = 10_000;

    /// <summary>
    /// From one connection of a set to the next. A source from 9.0 on has connected all before its first byte on the main channel; before that they
    /// come within a few round trips.
    /// </summary>
    private static readonly TimeSpan s_nextTimeout = TimeSpan.FromSeconds(5);

    private readonly List<SocketChannel> _data = [];
    private SocketChannel? _main;
    private int _surplus;
    private long _lastAt;

    /// <summary>Waits for all of them; once one has come, the others have a deadline.</summary>
    /// <param name="main">The main channel.</param>
    /// <param name="data">The channels of multifd.</param>
    /// <param name="refusal">Why this set must not be loaded: the source has more channels or fewer. Null for a good set.</param>
    /// <returns>False when the listener was stopped.</returns>
    internal bool TryAccept([NotNullWhen(true)] out SocketChannel? main, out IReadOnlyList<SocketChannel> data, out Exception? refusal)
    {
        (main, data, refusal) = (null, [], null);
        while (_main is null || (isOn() && _data.Count < MultifdPacket.Channels))
        {
            SocketChannel? peer = listener.Accept(LeftMs(), out bool timedOut);
            if (timedOut && _main is null)
            {
                // Channels without a main one: nobody's migration.
                Close();
                continue;
            }
            if (timedOut) break;
            if (peer is null) return false;
            // Without multifd there is one connection, and what it starts with is the stream's matter.
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
