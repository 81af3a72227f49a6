using Vmm.Core.Buffers;
using Vmm.Core.Interop;

namespace Vmm.Core.Channels;

/// <summary>Directions of a channel that a shutdown ends.</summary>
[Flags]
public enum ChannelShutdown
{
    /// <summary>No more reads.</summary>
    Read = 1,
    /// <summary>No more writes; the peer sees the end of the stream.</summary>
    Write = 2,
    /// <summary>Both directions.</summary>
    Both = 3,
}

/// <summary>
/// A blocking byte transport. At most one thread reads and one thread writes at a time; any thread may call <see cref="Shutdown"/>, which wakes
/// both, and <see cref="PeerHasClosed"/>. A read or write that fails, or that a shutdown ends, throws <see cref="Errors.ChannelException"/>; a read of 0 bytes
/// is the end of the stream. BQL: held or not.
/// </summary>
public interface IMigrationChannel : IDisposable
{
    /// <summary>Name in errors and logs, e.g. <c>tcp:127.0.0.1:4444</c>.</summary>
    string Name { get; }

    /// <summary>True if the peer can write on this channel too, as the return path needs.</summary>
    bool IsBidirectional { get; }

    /// <summary>Reads at least one byte.</summary>
    /// <param name="destination">Not empty.</param>
    /// <returns>Number of bytes read; 0 at the end of the stream.</returns>
    /// <exception cref="Errors.ChannelException">The transport failed or was shut down.</exception>
    int Read(Span<byte> destination);

    /// <summary>Writes all bytes.</summary>
    /// <exception cref="Errors.ChannelException">The transport failed, was shut down, or the peer is gone; part may have been written.</exception>
    void Write(ReadOnlySpan<byte> source);

    /// <summary>Writes all ranges and clears the list.</summary>
    /// <param name="parts">The ranges; empty afterwards, even if the write failed.</param>
    /// <exception cref="Errors.ChannelException">As for <see cref="Write"/>.</exception>
    void WriteGather(GatherList parts);

    /// <summary>Ends one or both directions, so that blocked calls return. Idempotent; never throws.</summary>
    void Shutdown(ChannelShutdown how);

    /// <summary>
    /// Waits until the other end has all written bytes: acknowledged for sockets, synced for files.
    /// </summary>
    /// <returns>False after the timeout, or at once if the transport cannot tell.</returns>
    bool Drain(TimeSpan timeout);

    /// <summary>True if the peer closed or reset its direction and all its bytes were read; false if the transport cannot tell. Never blocks.</summary>
    bool PeerHasClosed { get; }

    /// <summary>
    /// The socket of a channel that is nothing but a socket, in blocking mode and the channel's; null for every other channel. A device may let the
    /// kernel move its bytes between this socket and its own (splice(2)), so that they never enter this process's memory. Before it writes here it
    /// flushes what is queued; it moves on the thread that reads or writes the channel.
    /// </summary>
    OwnedFd? Descriptor => null;

    /// <summary>Reads at least one byte into the ranges of a list, in order, and removes the parts that were filled.</summary>
    /// <param name="parts">Not empty; all of it memory that a load may write.</param>
    /// <returns>Number of bytes read; 0 at the end of the stream.</returns>
    /// <exception cref="Errors.ChannelException">As for <see cref="Read"/>.</exception>
    internal int ReadScatter(GatherList parts)
    {
        int n = Read(parts.FirstToFill());
        parts.Filled(n);
        return n;
    }
}

/// <summary>A channel over a file, with positioned reads and writes beside the sequential ones.</summary>
internal interface ISeekableChannel : IMigrationChannel
{
    /// <summary>Present length of the file.</summary>
    long LengthBytes { get; }

    /// <summary>Position of the next sequential read or write, from the start of the file.</summary>
    long Position { get; set; }

    /// <summary>Fills the span from a position.</summary>
    /// <param name="destination">Filled completely.</param>
    /// <param name="offset">Absolute file offset.</param>
    void ReadAt(Span<byte> destination, long offset);

    /// <summary>Writes at a position.</summary>
    /// <param name="source">Written completely.</param>
    /// <param name="offset">Absolute file offset.</param>
    void WriteAt(ReadOnlySpan<byte> source, long offset);
}
