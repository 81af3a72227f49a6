using Vmm.Core.Buffers;
using Vmm.Core.Interop;

namespace Vmm.Core.Channels;

/// <summary>Which direction of a channel is ended.</summary>
[Flags]
public enum ChannelShutdown
{
    /// <summary>No more reads.</summary>
    Read = 1,
    /// <summary>No more writes; the peer sees the end of the stream.</summary>
    Write = 2,
    /// <summary>Both.</summary>
    Both = 3,
}

/// <summary>
/// A blocking byte transport. One thread reads and one thread writes at a time; <see cref="Shutdown"/> may be called by any thread and wakes
/// both. Failures are <see cref="Errors.ChannelException"/>; the end of the stream is a read of 0 bytes.
/// </summary>
public interface IMigrationChannel : IDisposable
{
    /// <summary>For errors and logs, e.g. <c>tcp:127.0.0.1:4444</c>.</summary>
    string Name { get; }

    /// <summary>True when the other side can write back on this channel (the return path needs it).</summary>
    bool IsBidirectional { get; }

    /// <summary>Reads at least one byte.</summary>
    /// <param name="destination">Not empty.</param>
    /// <returns>Bytes read; 0 at the end of the stream.</returns>
    int Read(Span<byte> destination);

    /// <summary>Writes all bytes.</summary>
    /// <param name="source">Bytes to write.</param>
    void Write(ReadOnlySpan<byte> source);

    /// <summary>Writes all ranges and clears the list.</summary>
    /// <param name="parts">The list; empty afterwards, also on failure.</param>
    void WriteGather(GatherList parts);

    /// <summary>Ends one or both directions; blocked calls return. Idempotent, never throws.</summary>
    /// <param name="how">Which direction.</param>
    void Shutdown(ChannelShutdown how);

    /// <summary>
    /// Waits until the peer's side has taken everything written: acknowledged for sockets, synced for files.
    /// </summary>
    /// <param name="timeout">Longest wait.</param>
    /// <returns>False after the timeout, or where the transport cannot tell and nothing was waited for.</returns>
    bool Drain(TimeSpan timeout);

    /// <summary>True if the peer has ended or reset its direction and nothing of it is left to read. Never blocks; false where the transport cannot tell.</summary>
    bool PeerHasClosed { get; }
}

/// <summary>
/// A channel that is nothing but a socket. A device may let the kernel move its bytes between this socket and its own (splice(2)), and they never
/// enter this process's memory. Before it writes to <see cref="Descriptor"/> it flushes what is queued; it moves on the thread that reads or writes
/// the channel.
/// </summary>
public interface IDescriptorChannel : IMigrationChannel
{
    /// <summary>The socket, in blocking mode; the channel's.</summary>
    OwnedFd Descriptor { get; }
}

/// <summary>A channel over a file: positioned reads and writes beside the sequential ones.</summary>
internal interface ISeekableChannel : IMigrationChannel
{
    /// <summary>Length of the file now.</summary>
    long LengthBytes { get; }

    /// <summary>Position of the next sequential read or write, from the start of the file.</summary>
    long Position { get; set; }

    /// <summary>Fills the span from a position.</summary>
    /// <param name="destination">Filled completely.</param>
    /// <param name="offset">Absolute file offset.</param>
    void ReadAt(Span<byte> destination, long offset);

    /// <summary>Writes at a position.</summary>
    /// <param name="source">Bytes.</param>
    /// <param name="offset">Absolute file offset.</param>
    void WriteAt(ReadOnlySpan<byte> source, long offset);
}
