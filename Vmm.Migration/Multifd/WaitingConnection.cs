using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>What the first bytes of a connection say that it is.</summary>
internal enum ConnectionKind
{
    /// <summary>They have not all come.</summary>
    Undecided,
    /// <summary>The header of a stream: the main channel of a source.</summary>
    Main,
    /// <summary>The preamble of a channel of multifd.</summary>
    Data,
    /// <summary>Neither: some other peer.</summary>
    Foreign,
}

/// <summary>An accepted connection that no load has taken. Its bytes are only looked at. One thread at a time.</summary>
internal sealed class WaitingConnection(SocketChannel channel, ulong key)
{
    /// <summary>
    /// Bytes that decide: a stream's header and one byte more, which a source that was stopped while it connected has not sent, and a preamble up to its id.
    /// </summary>
    private const int MainBytes = 9, PreambleHeadBytes = MultifdPacket.PreambleIdOffset + 1;

    /// <summary>First bytes of a foreign connection that a message shows.</summary>
    private const int ShownBytes = 8;

    internal SocketChannel Channel { get; } = channel;

    /// <summary>Its number among all connections, in the order of their arrival.</summary>
    internal ulong Key { get; } = key;

    /// <summary>Timestamp of the accept.</summary>
    internal long AcceptedAt { get; } = Stopwatch.GetTimestamp();

    /// <summary>Timestamp of the moment when the first bytes told what it is.</summary>
    internal long DecidedAt { get; private set; }

    internal ConnectionKind Kind { get; private set; }

    /// <summary>The channel's id in its preamble; -1 for other connections.</summary>
    internal int Id { get; private set; } = -1;

    /// <summary>The first bytes as far as they have come, for a message about a foreign connection.</summary>
    internal string FirstBytes { get; private set; } = string.Empty;

    /// <summary>Looks at the bytes that have come.</summary>
    /// <param name="header">The header of every stream.</param>
    /// <returns>
    /// False if its peer has given it up: it ended the connection and sent nothing, or no more than its first bytes, as a source does that is cancelled while it
    /// connects. A source that has sent more may be complete and gone, so its connection stays.
    /// </returns>
    internal bool Look(ReadOnlySpan<byte> header)
    {
        Span<byte> buffer = stackalloc byte[MultifdPacket.PreambleBytes + 1];
        int n = Channel.Peek(buffer, out PeerEnd end);
        ReadOnlySpan<byte> bytes = buffer[..n];
        if (Kind == ConnectionKind.Undecided && Decide(bytes, header) is var kind and not ConnectionKind.Undecided)
        {
            (Kind, DecidedAt) = (kind, Stopwatch.GetTimestamp());
            if (kind == ConnectionKind.Data) Id = bytes[MultifdPacket.PreambleIdOffset];
            if (kind == ConnectionKind.Foreign) FirstBytes = Convert.ToHexStringLower(bytes[..Math.Min(n, ShownBytes)]);
        }
        if (end == PeerEnd.Open) return true;
        return end == PeerEnd.Closed && (Kind == ConnectionKind.Main || (Kind == ConnectionKind.Data && n > MultifdPacket.PreambleBytes));
    }

    /// <summary>A connection is foreign as soon as one byte differs from both beginnings, so that it does not wait for more.</summary>
    private static ConnectionKind Decide(ReadOnlySpan<byte> bytes, ReadOnlySpan<byte> header)
    {
        if (IsOrBegins(bytes, header)) return bytes.Length >= MainBytes ? ConnectionKind.Main : ConnectionKind.Undecided;
        Span<byte> magic = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(magic, MultifdPacket.Magic);
        if (!IsOrBegins(bytes, magic)) return ConnectionKind.Foreign;
        return bytes.Length >= PreambleHeadBytes ? ConnectionKind.Data : ConnectionKind.Undecided;
    }

    private static bool IsOrBegins(ReadOnlySpan<byte> bytes, ReadOnlySpan<byte> start)
    {
        int n = Math.Min(bytes.Length, start.Length);
        return bytes[..n].SequenceEqual(start[..n]);
    }
}
