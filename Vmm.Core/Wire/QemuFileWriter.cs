using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Memory;

namespace Vmm.Core.Wire;

/// <summary>
/// Buffered big-endian writer over a channel. It copies small values and references guest pages, and sends both in one gather write. Used by one
/// thread at a time. If the channel fails, a write or <see cref="Flush"/> throws <see cref="Errors.ChannelException"/> at once; no error is kept for later (QEMU:
/// <c>QEMUFile</c>).
/// </summary>
public sealed class QemuFileWriter : IDisposable
{
    /// <summary>The writer sends when this many bytes are queued.</summary>
    private const int FlushBytes = 1 << 20;

    private readonly IMigrationChannel _channel;
    private readonly GatherList _list = new();

    /// <summary>Writes to a channel, which the caller disposes.</summary>
    public QemuFileWriter(IMigrationChannel channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        _channel = channel;
    }

    /// <summary>Stream offset of the next byte: all bytes written so far, sent or queued.</summary>
    public long Position { get; private set; }

    /// <summary>Bytes that the channel has received so far.</summary>
    public long FlushedBytes => Position - _list.PendingBytes;

    /// <summary>True while a thread waits in the channel's write. Any thread.</summary>
    internal bool IsWriting { get; private set; }

    /// <summary>The channel that the bytes go to.</summary>
    public IMigrationChannel Channel => _channel;

    /// <summary>Writes one byte.</summary>
    public void WriteByte(byte value) => Reserve(1)[0] = value;

    /// <summary>Writes a bool as one byte, 0 or 1.</summary>
    public void WriteBool(bool value) => WriteByte(value ? (byte)1 : (byte)0);

    /// <summary>Writes a u16.</summary>
    public void WriteUInt16(ushort value) => BinaryPrimitives.WriteUInt16BigEndian(Reserve(2), value);

    /// <summary>Writes a u32.</summary>
    public void WriteUInt32(uint value) => BinaryPrimitives.WriteUInt32BigEndian(Reserve(4), value);

    /// <summary>Writes an i32.</summary>
    public void WriteInt32(int value) => BinaryPrimitives.WriteInt32BigEndian(Reserve(4), value);

    /// <summary>Writes a u64.</summary>
    public void WriteUInt64(ulong value) => BinaryPrimitives.WriteUInt64BigEndian(Reserve(8), value);

    /// <summary>Writes an i64.</summary>
    public void WriteInt64(long value) => BinaryPrimitives.WriteInt64BigEndian(Reserve(8), value);

    /// <summary>Writes bytes.</summary>
    /// <param name="bytes">Any number; the caller may reuse the memory after the call.</param>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        if (bytes.Length > 4096)
        {
            Flush();
            IsWriting = true;
            _channel.Write(bytes);
            IsWriting = false;
            Position += bytes.Length;
            return;
        }
        bytes.CopyTo(Reserve(bytes.Length));
    }

    /// <summary>Writes zero bytes.</summary>
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
    /// <exception cref="ArgumentException">The text has more than 255 bytes.</exception>
    public void WriteCountedString(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        if (text.Length > 255) throw new ArgumentException($"'{text}' is longer than 255 bytes", nameof(text));
        Span<byte> at = Reserve(1 + text.Length);
        at[0] = (byte)text.Length;
        Encoding.Latin1.GetBytes(text, at[1..]);
    }

    /// <summary>
    /// Queues <paramref name="length"/> bytes of a block, from an offset in bytes, without copying: the flush sends the content that it finds then.
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the block.</exception>
    public void WriteGuest(RamBlock block, ulong offset, int length)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (!_list.HasRoom || _list.PendingBytes >= FlushBytes) Flush();
        block.AppendTo(_list, offset, length);
        Position += length;
    }

    /// <summary>
    /// Queues a u64 header and the page of that index in the block, without copying the page: the flush sends the content that it finds then.
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">The block has no such page.</exception>
    public void WriteGuestPage(ulong header, RamBlock block, long page)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (_list.PendingBytes >= FlushBytes || !_list.HasRoom) Flush();
        block.AppendPageTo(_list, header, page);
        Position += 8 + RamBlock.PageSize;
    }

    /// <summary>
    /// Adds bytes to <see cref="Position"/> that somebody moves to the channel's descriptor after a flush (<see cref="IMigrationChannel.Descriptor"/>).
    /// </summary>
    public void NoteMoved(long count) => Position += count;

    /// <summary>Sends everything queued to the channel.</summary>
    public void Flush()
    {
        if (_list.PendingBytes == 0) return;
        IsWriting = true;
        _channel.WriteGather(_list);
        IsWriting = false;
    }

    /// <summary>Frees the buffers and drops queued bytes.</summary>
    public void Dispose() => _list.Dispose();

    private Span<byte> Reserve(int count)
    {
        if (!_list.HasRoom || _list.ArenaFree < count || _list.PendingBytes >= FlushBytes) Flush();
        Position += count;
        return _list.Reserve(count);
    }
}
