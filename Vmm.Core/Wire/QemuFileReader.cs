using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Core.Wire;

/// <summary>
/// Buffered big-endian reader over a channel, with lookahead. Used by one thread at a time; reads block. Every read may throw two errors:
/// <see cref="StreamTruncatedException"/> with the offset if the stream ends inside a value, <see cref="ChannelException"/> if the channel fails (QEMU:
/// <c>QEMUFile</c>, <c>qemu_peek_buffer</c>).
/// </summary>
public sealed class QemuFileReader
{
    private const int BufferBytes = 256 * 1024;

    private readonly IMigrationChannel _channel;
    private readonly byte[] _buffer;
    private int _start;
    private int _end;
    private long _received;

    /// <summary>Reads from a channel, which the caller disposes.</summary>
    public QemuFileReader(IMigrationChannel channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        _channel = channel;
        _buffer = GC.AllocateUninitializedArray<byte>(BufferBytes, pinned: true);
    }

    /// <summary>Stream offset of the next byte: bytes consumed since the first one that this reader read.</summary>
    public long Position => _received - (_end - _start);

    /// <summary>Offset of the next byte in the channel's file, in which the stream may begin anywhere; -1 for a channel that is no file.</summary>
    internal long FileOffset => _channel is ISeekableChannel file ? file.Position - (_end - _start) : -1;

    /// <summary>True when the buffer holds bytes that nobody has read.</summary>
    internal bool HasBuffered => _start < _end;

    /// <summary>The channel that the bytes come from.</summary>
    public IMigrationChannel Channel => _channel;

    /// <summary>
    /// Limit of the bytes that one read of the channel may fetch beyond the bytes asked for. Smaller while bytes move from the channel's descriptor
    /// without passing this buffer (<see cref="IMigrationChannel.Descriptor"/>).
    /// </summary>
    public int ReadAheadBytes { get; set; } = BufferBytes;

    /// <summary>Name of the part being read, for error messages; e.g. <c>ram/0</c>.</summary>
    public string Section { get; set; } = "header";

    /// <summary>Reads one byte.</summary>
    public byte ReadByte()
    {
        if (_start == _end) Ensure(1, "byte");
        return _buffer[_start++];
    }

    /// <summary>Reads one byte as a bool: non-zero is true.</summary>
    public bool ReadBool() => ReadByte() != 0;

    /// <summary>Reads a u16.</summary>
    public ushort ReadUInt16() => BinaryPrimitives.ReadUInt16BigEndian(Take(2, "u16"));

    /// <summary>Reads a u32.</summary>
    public uint ReadUInt32() => BinaryPrimitives.ReadUInt32BigEndian(Take(4, "u32"));

    /// <summary>Reads an i32.</summary>
    public int ReadInt32() => BinaryPrimitives.ReadInt32BigEndian(Take(4, "i32"));

    /// <summary>Reads a u64.</summary>
    public ulong ReadUInt64() => BinaryPrimitives.ReadUInt64BigEndian(Take(8, "u64"));

    /// <summary>Reads an i64.</summary>
    public long ReadInt64() => BinaryPrimitives.ReadInt64BigEndian(Take(8, "i64"));

    /// <summary>Reads a counted string of at most 255 Latin-1 bytes.</summary>
    public string ReadCountedString()
    {
        int n = ReadByte();
        return n == 0 ? string.Empty : Encoding.Latin1.GetString(Take(n, "counted string"));
    }

    /// <summary>Fills a span.</summary>
    /// <param name="destination">Filled completely.</param>
    public void Read(Span<byte> destination)
    {
        int n = Math.Min(destination.Length, _end - _start);
        _buffer.AsSpan(_start, n).CopyTo(destination);
        _start += n;
        destination = destination[n..];
        while (destination.Length >= BufferBytes / 2)
        {
            // A large read does not pass the buffer.
            n = _channel.Read(destination);
            if (n == 0) throw Truncated(destination.Length);
            _received += n;
            destination = destination[n..];
        }
        while (destination.Length > 0)
        {
            Ensure(1, "bytes");
            n = Math.Min(destination.Length, _end - _start);
            _buffer.AsSpan(_start, n).CopyTo(destination);
            _start += n;
            destination = destination[n..];
        }
    }

    /// <summary>Reads <paramref name="length"/> bytes into a block at an offset in bytes; marks nothing dirty.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the block.</exception>
    public void ReadGuest(RamBlock block, ulong offset, int length)
    {
        ArgumentNullException.ThrowIfNull(block);
        Read(block.Slice(offset, length));
    }

    /// <summary>Fills all ranges of a list, which are guest memory, and clears it. What is not in the buffer yet does not pass it.</summary>
    internal void ReadScatter(GatherList parts)
    {
        while (parts.PendingBytes > 0)
        {
            int n = _end - _start;
            if (n > 0)
            {
                Span<byte> first = parts.FirstToFill();
                n = Math.Min(n, first.Length);
                _buffer.AsSpan(_start, n).CopyTo(first);
                _start += n;
                parts.Filled(n);
                continue;
            }
            n = _channel.ReadScatter(parts);
            if (n == 0) throw Truncated((int)Math.Min(parts.PendingBytes, int.MaxValue));
            _received += n;
        }
    }

    /// <summary>Takes bytes that are already in the buffer.</summary>
    /// <param name="max">Largest number of bytes to take.</param>
    /// <returns>0 to <paramref name="max"/> bytes; valid until the next call.</returns>
    public ReadOnlySpan<byte> TakeBuffered(int max)
    {
        int n = Math.Min(max, _end - _start);
        _start += n;
        return _buffer.AsSpan(_start - n, n);
    }

    /// <summary>Adds bytes that were moved from the channel's descriptor to <see cref="Position"/>; the buffer must be empty.</summary>
    public void NoteMoved(long count) => _received += count;

    /// <summary>Skips bytes.</summary>
    public void Skip(long count)
    {
        while (count > 0)
        {
            Ensure(1, "bytes");
            int n = (int)Math.Min(count, _end - _start);
            _start += n;
            count -= n;
        }
    }

    /// <summary>Moves to another offset of the stream, forward or back.</summary>
    /// <param name="position">Stream offset of the next byte to read.</param>
    /// <exception cref="InvalidOperationException">The channel is not an <see cref="ISeekableChannel"/> and the buffer does not hold the offset.</exception>
    public void Seek(long position)
    {
        long ahead = position - Position;
        if (ahead >= 0 && ahead <= _end - _start)
        {
            _start += (int)ahead;
            return;
        }
        if (_channel is not ISeekableChannel file) throw new InvalidOperationException($"{_channel.Name} cannot seek");
        file.Position += position - _received;
        _received = position;
        _start = _end = 0;
    }

    /// <summary>Shows the next bytes without consuming them.</summary>
    /// <param name="count">Number of bytes, at most 4096.</param>
    /// <returns>The bytes; fewer only at the end of the stream. Valid until the next call.</returns>
    /// <exception cref="ArgumentOutOfRangeException">More than 4096.</exception>
    public ReadOnlySpan<byte> Peek(int count)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(count, 4096);
        while (_end - _start < count && Fill()) { }
        return _buffer.AsSpan(_start, Math.Min(count, _end - _start));
    }

    /// <summary>Makes an exception that names section, offset, expected and found.</summary>
    /// <param name="what">Name of the field.</param>
    /// <param name="expected">What the format requires.</param>
    /// <param name="found">What the bytes hold.</param>
    /// <param name="offset">Stream offset of the offending bytes; null for the present position.</param>
    /// <returns>The exception, to throw.</returns>
    public StreamFormatException Bad(string what, string expected, string found, long? offset = null) =>
        new($"section '{Section}', offset {offset ?? Position}: {what}: expected {expected}, found {found}")
        {
            Section = Section, Offset = offset ?? Position, Expected = expected, Found = found,
        };

    private ReadOnlySpan<byte> Take(int count, string what)
    {
        if (_end - _start < count) Ensure(count, what);
        ReadOnlySpan<byte> at = _buffer.AsSpan(_start, count);
        _start += count;
        return at;
    }

    private void Ensure(int count, string what)
    {
        while (_end - _start < count)
            if (!Fill()) throw Truncated(count, what);
    }

    private bool Fill()
    {
        if (_start == _end) _start = _end = 0;
        else if (_end == _buffer.Length || _start > BufferBytes / 2)
        {
            _buffer.AsSpan(_start, _end - _start).CopyTo(_buffer);
            _end -= _start;
            _start = 0;
        }
        int n = _channel.Read(_buffer.AsSpan(_end, Math.Min(_buffer.Length - _end, ReadAheadBytes)));
        _end += n;
        _received += n;
        return n > 0;
    }

    private StreamTruncatedException Truncated(int count, string what = "bytes") =>
        new($"section '{Section}', offset {Position}: the stream ended at offset {_received} inside {what}: expected {count} bytes, found {_end - _start}") { Offset = Position };

    /// <summary>Makes an exception for well-formed input that is over a limit of <see cref="WireLimits"/>.</summary>
    /// <param name="found">What was found, e.g. <c>a machine name of 2000 bytes</c>.</param>
    /// <param name="limit">The most that is taken.</param>
    /// <param name="name">Name of the limit in <see cref="WireLimits"/>.</param>
    internal StreamLimitException Over(string found, long limit, string name) =>
        new($"section '{Section}', offset {Position}: {found} is over {limit} (WireLimits.{name})");
}
