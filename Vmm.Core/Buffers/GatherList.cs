using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Buffers;

/// <summary>
/// A list of byte ranges for one gather write. The list copies small values into an arena of its own and references guest pages in place. Not
/// thread-safe; one owner. Referenced memory must stay mapped until <see cref="Clear"/>.
/// </summary>
public sealed unsafe class GatherList : IDisposable
{
    /// <summary>Largest number of ranges in one list (Linux: IOV_MAX).</summary>
    public const int MaxSegments = 1024;

    private readonly IoVector _segments = new(MaxSegments);
    private readonly byte* _arena;
    private readonly int _arenaBytes;
    private int _arenaUsed;
    private int _count;
    private int _next;
    private bool _disposed;

    /// <summary>Makes an empty list.</summary>
    /// <param name="arenaBytes">Bytes that <see cref="Append"/> can copy between two calls of <see cref="Clear"/>.</param>
    public GatherList(int arenaBytes = 64 * 1024)
    {
        _arenaBytes = arenaBytes;
        // SAFETY: freed in Dispose.
        _arena = (byte*)NativeMemory.Alloc((nuint)arenaBytes);
    }

    /// <summary>Bytes in the list that were not written yet.</summary>
    public long PendingBytes { get; private set; }

    /// <summary>Number of ranges in the list.</summary>
    public int Count => _count - _next;

    /// <summary>Bytes that the list can still copy.</summary>
    public int ArenaFree => _arenaBytes - _arenaUsed;

    /// <summary>True if the list has room for another small value and another reference.</summary>
    public bool HasRoom => _count + 2 <= MaxSegments && ArenaFree >= 512;

    /// <summary>Copies bytes to the end of the list.</summary>
    /// <param name="bytes">At most <see cref="ArenaFree"/> bytes.</param>
    public void Append(ReadOnlySpan<byte> bytes) => bytes.CopyTo(Reserve(bytes.Length));

    /// <summary>Adds <paramref name="length"/> bytes to the end of the list; the caller fills them before its next call.</summary>
    /// <param name="length">At most <see cref="ArenaFree"/>.</param>
    /// <returns>The bytes to fill; their content is undefined.</returns>
    /// <exception cref="ArgumentOutOfRangeException">More than <see cref="ArenaFree"/>.</exception>
    /// <exception cref="InvalidOperationException">The list has <see cref="MaxSegments"/> ranges.</exception>
    public Span<byte> Reserve(int length)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(length, ArenaFree);
        // SAFETY: the range lies inside the arena (checked above); the segment array has MaxSegments entries (checked in AddSegment).
        byte* at = _arena + _arenaUsed;
        AddSegment(at, length);
        _arenaUsed += length;
        return new Span<byte>(at, length);
    }

    /// <summary>References memory without copying it. Callers go through <c>RamBlock</c>, which checks the range.</summary>
    internal void AddReference(byte* address, int length)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        AddSegment(address, length);
    }

    /// <summary>
    /// Adds an eight-byte header and a reference in one step: a RAM record, of which a GiB has a quarter of a million. The caller has checked
    /// <see cref="HasRoom"/>.
    /// </summary>
    internal void AddRecord(ulong header, byte* address, int length)
    {
        if (_disposed || _count + 2 > MaxSegments || _arenaUsed + 8 > _arenaBytes) throw new InvalidOperationException("gather list is full");
        // SAFETY: room for two entries and eight arena bytes was checked above.
        byte* at = _arena + _arenaUsed;
        *(ulong*)at = BitConverter.IsLittleEndian ? System.Buffers.Binary.BinaryPrimitives.ReverseEndianness(header) : header;
        _segments.Set(_count, at, 8);
        _segments.Set(_count + 1, address, length);
        _arenaUsed += 8;
        _count += 2;
        PendingBytes += 8 + length;
    }

    /// <summary>Shows the bytes of one range.</summary>
    /// <param name="index">0 to <see cref="Count"/> - 1.</param>
    /// <returns>A view of them; the guest may change its memory at any time.</returns>
    public ReadOnlySpan<byte> Segment(int index)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)index, (uint)Count);
        // SAFETY: index checked; the range was valid when added and stays so until Clear.
        return new ReadOnlySpan<byte>(_segments.Start(_next + index), checked((int)_segments.Length(_next + index)));
    }

    /// <summary>Removes all ranges.</summary>
    public void Clear()
    {
        _count = _next = _arenaUsed = 0;
        PendingBytes = 0;
    }

    /// <summary>
    /// Writes the ranges with one writev, or one pwritev if <paramref name="offset"/> is not negative, and removes the bytes that the kernel took.
    /// </summary>
    /// <returns>Number of bytes written, or -1.</returns>
    internal long WriteOnce(OwnedFd fd, long offset, out Errno errno)
    {
        long n = _segments.Write(fd, _next, Count, offset, out errno);
        if (n >= 0) Advance(n);
        return n;
    }

    /// <summary>As <see cref="WriteOnce"/>, for a socket; never raises SIGPIPE.</summary>
    internal long SendOnce(OwnedFd fd, out Errno errno)
    {
        long n = _segments.Send(fd, _next, Count, out errno);
        if (n >= 0) Advance(n);
        return n;
    }

    /// <summary>
    /// Receives from a socket into the ranges, in order, and removes the parts that were filled. Every range must be memory that may be written: one that
    /// <c>RamBlock</c> added for a load.
    /// </summary>
    /// <returns>Number of bytes received, 0 at the end of the stream, or -1.</returns>
    internal long ReceiveOnce(OwnedFd fd, int flags, out Errno errno)
    {
        long n = _segments.Receive(fd, _next, Count, flags, out errno);
        if (n > 0) Advance(n);
        return n;
    }

    /// <summary>The first range, to be filled from its start; the same condition as for <see cref="ReceiveOnce"/>.</summary>
    internal Span<byte> FirstToFill()
    {
        // SAFETY: the list is not empty (checked by the indexer), and the range was valid when added and stays so until Clear.
        return new Span<byte>(_segments.Start(_next), Segment(0).Length);
    }

    /// <summary>Removes bytes from the start of the list that were filled.</summary>
    internal void Filled(int bytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(bytes, PendingBytes);
        Advance(bytes);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        // SAFETY: allocated in the constructor, freed once.
        _segments.Dispose();
        NativeMemory.Free(_arena);
    }

    private void AddSegment(byte* at, int length)
    {
        PendingBytes += length;
        if (_count > _next)
        {
            // SAFETY: _count - 1 is a valid entry. Adjacent ranges join, so that a run of copied values takes one entry.
            byte* last = _segments.Start(_count - 1);
            long lastLength = _segments.Length(_count - 1);
            if (last + lastLength == at) { _segments.Set(_count - 1, last, lastLength + length); return; }
        }
        if (_count == MaxSegments) throw new InvalidOperationException("gather list is full");
        // SAFETY: _count < MaxSegments.
        _segments.Set(_count++, at, length);
    }

    private void Advance(long written)
    {
        PendingBytes -= written;
        while (written > 0)
        {
            // SAFETY: the kernel never reports more than it was given, so _next stays below _count.
            long length = _segments.Length(_next);
            if (written < length) { _segments.Set(_next, _segments.Start(_next) + written, length - written); return; }
            written -= length;
            _next++;
        }
        if (_next == _count) Clear();
    }
}
