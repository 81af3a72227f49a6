using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Memory;

namespace Vmm.Core.Wire;

/// <summary>
/// Buffered big-endian writer over a channel. Small values are copied into an arena, guest pages are referenced and leave in one gather
/// write. One thread at a time. Failures are thrown at the write or at <see cref="Flush"/>; there is no sticky error (QEMU: <c>QEMUFile</c>).
/// </summary>
public sealed class QemuFileWriter : IDisposable
{
    /// <summary>Bytes queued before a gather write is made.</summary>
    private const int FlushBytes = 1 << 20;

    private readonly IMigrationChannel _channel;
    private readonly GatherList _list = new();

    /// <summary>Wraps a channel; the channel stays the caller's.</summary>
    /// <param name="channel">Where bytes go.</param>
    public QemuFileWriter(IMigrationChannel channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        _channel = channel;
    }

    /// <summary>Bytes accepted so far, flushed or not: the stream offset of the next byte.</summary>
    public long Position { get; private set; }

    /// <summary>Bytes handed to the channel so far.</summary>
    public long FlushedBytes => Position - _list.PendingBytes;

    /// <summary>The channel written to.</summary>
    public IMigrationChannel Channel => _channel;

    /// <summary>Writes one byte.</summary>
    /// <param name="value">The value.</param>
    public void WriteByte(byte value) => Reserve(1)[0] = value;

    /// <summary>Writes a bool as one byte, 0 or 1.</summary>
    /// <param name="value">The value.</param>
    public void WriteBool(bool value) => WriteByte(value ? (byte)1 : (byte)0);

    /// <summary>Writes a u16.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt16(ushort value) => BinaryPrimitives.WriteUInt16BigEndian(Reserve(2), value);

    /// <summary>Writes a u32.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt32(uint value) => BinaryPrimitives.WriteUInt32BigEndian(Reserve(4), value);

    /// <summary>Writes an i32.</summary>
    /// <param name="value">The value.</param>
    public void WriteInt32(int value) => BinaryPrimitives.WriteInt32BigEndian(Reserve(4), value);

    /// <summary>Writes a u64.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt64(ulong value) => BinaryPrimitives.WriteUInt64BigEndian(Reserve(8), value);

    /// <summary>Writes an i64.</summary>
    /// <param name="value">The value.</param>
    public void WriteInt64(long value) => BinaryPrimitives.WriteInt64BigEndian(Reserve(8), value);

    /// <summary>Writes bytes.</summary>
    /// <param name="bytes">Any number; they are copied or written before the call returns.</param>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        if (bytes.Length > 4096)
        {
            Flush();
            _channel.Write(bytes);
            Position += bytes.Length;
            return;
        }
        bytes.CopyTo(Reserve(bytes.Length));
    }

    /// <summary>Writes zero bytes.</summary>
    /// <param name="count">How many.</param>
    public void WriteZeros(int count)
    {
        while (count > 0)
        {
            int n = Math.Min(count, 4096);
            Reserve(n).Clear();
            count -= n;
        }
    }

    /// <summary>Writes a counted string: one length byte and up to 255 Latin-1 bytes.</summary>
    /// <param name="text">The text.</param>
    /// <exception cref="ArgumentException">Over 255 bytes.</exception>
    public void WriteCountedString(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        if (text.Length > 255) throw new ArgumentException($"'{text}' is longer than 255 bytes", nameof(text));
        Span<byte> at = Reserve(1 + text.Length);
        at[0] = (byte)text.Length;
        Encoding.Latin1.GetBytes(text, at[1..]);
    }

    /// <summary>Queues guest memory without copying; what leaves is the content at the time of the flush.</summary>
    /// <param name="block">The block.</param>
    /// <param name="offset">Offset in the block.</param>
    /// <param name="length">Bytes.</param>
    public void WriteGuest(RamBlock block, ulong offset, int length)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (!_list.HasRoom || _list.PendingBytes >= FlushBytes) Flush();
        block.AppendTo(_list, offset, length);
        Position += length;
    }

    /// <summary>Queues a u64 and a page of guest memory behind it, without copying the page; what leaves is its content at the time of the flush.</summary>
    /// <param name="header">The record's first word.</param>
    /// <param name="block">The block.</param>
    /// <param name="page">Page index.</param>
    public void WriteGuestPage(ulong header, RamBlock block, long page)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (_list.PendingBytes >= FlushBytes || !_list.HasRoom) Flush();
        block.AppendPageTo(_list, header, page);
        Position += 8 + RamBlock.PageSize;
    }

    /// <summary>Counts bytes that were, or will be, moved to the channel's descriptor behind what was flushed (<see cref="IDescriptorChannel"/>).</summary>
    /// <param name="count">Bytes.</param>
    public void NoteMoved(long count) => Position += count;

    /// <summary>Hands everything queued to the channel.</summary>
    public void Flush()
    {
        if (_list.PendingBytes > 0) _channel.WriteGather(_list);
    }

    /// <summary>Frees the buffers; what was not flushed is dropped.</summary>
    public void Dispose() => _list.Dispose();

    private Span<byte> Reserve(int count)
    {
        if (!_list.HasRoom || _list.ArenaFree < count || _list.PendingBytes >= FlushBytes) Flush();
        Position += count;
        return _list.Reserve(count);
    }
}
