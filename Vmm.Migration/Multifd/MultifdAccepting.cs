using System.Buffers.Binary;
using System.Diagnostics.CodeAnalysis;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Takes the connections of one incoming migration: a main channel and, with multifd, others, told apart by their first four bytes and in any
/// order (spec 14.3). What is not handed on is closed on dispose.
/// </summary>
/// <param name="listener">Where they come in.</param>
/// <param name="isOn">Whether capability multifd is on; asked at each connection, since it may be switched on after the listening began.</param>
internal sealed class MultifdAccepting(MigrationListener listener, Func<bool> isOn) : IDisposable
{
    private const int FirstBytesTimeoutMs = 10_000;

    private readonly List<SocketChannel> _data = [];
    private SocketChannel? _main;

    /// <summary>Waits for all of them.</summary>
    /// <returns>False when the listener was stopped.</returns>
    internal bool TryAccept([NotNullWhen(true)] out SocketChannel? main, out IReadOnlyList<SocketChannel> data)
    {
        (main, data) = (null, []);
        while (_main is null || (isOn() && _data.Count < MultifdPacket.Channels))
        {
            SocketChannel? peer = listener.Accept();
            if (peer is null) return false;
            // Without multifd there is one connection, and what it starts with is the stream's matter.
            bool isMultifd = isOn() && IsMultifd(peer);
            if (isMultifd && _data.Count < MultifdPacket.Channels) _data.Add(peer);
            else if (!isMultifd && _main is null) _main = peer;
            else peer.Dispose();
        }
        (main, data) = (_main, [.. _data]);
        _main = null;
        _data.Clear();
        return true;
    }

    public void Dispose()
    {
        _main?.Dispose();
        _data.ForEach(static c => c.Dispose());
    }

    private static bool IsMultifd(SocketChannel peer)
    {
        Span<byte> first = stackalloc byte[4];
        return peer.PeekFirst(first, FirstBytesTimeoutMs) && BinaryPrimitives.ReadUInt32BigEndian(first) == MultifdPacket.Magic;
    }
}
