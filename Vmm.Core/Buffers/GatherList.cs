using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Buffers;

/// <summary>
/// A list of byte ranges for one gather write: small values are copied into an arena of this list, guest pages are referenced where they
/// lie. Not thread-safe; one owner. The referenced memory must stay mapped until <see cref="Clear"/>.
/// </summary>
public sealed unsafe class GatherList : IDisposable
{
    /// <summary>Most ranges in one list (IOV_MAX of Linux).</summary>
    public const int MaxSegments = 1024;

    private readonly IoVector _segments = new(MaxSegments);
    private readonly byte* _arena;
    private readonly int _arenaBytes;
    private int _arenaUsed;
    private int _count;
    private int _next;
    private bool _disposed;

    /// <summary>Makes an empty list.</summary>
    /// <param name="arenaBytes">Bytes that <see cref="Append"/> can hold between two clears.</param>
    public GatherList(int arenaBytes = 64 * 1024)
    {
        _arenaBytes = arenaBytes;
        // SAFETY: freed in Dispose.
        _arena = (byte*)NativeMemory.Alloc((nuint)arenaBytes);
    }

    /// <summary>Bytes in the list that are not yet written.</summary>
    public long PendingBytes { get; private set; }

    /// <summary>Ranges in the list.</summary>
    public int Count => _count - _next;

    /// <summary>Bytes that can still be appended by copy.</summary>
    public int ArenaFree => _arenaBytes - _arenaUsed;

    /// <summary>True when another small value and another reference fit.</summary>
    public bool HasRoom => _count + 2 <= MaxSegments && ArenaFree >= 512;

    /// <summary>Copies bytes to the end of the list.</summary>
    /// <param name="bytes">At most <see cref="ArenaFree"/> bytes.</param>
    public void Append(ReadOnlySpan<byte> bytes) => bytes.CopyTo(Reserve(bytes.Length));

    /// <summary>Adds <paramref name="length"/> bytes to the end of the list for the caller to fill at once.</summary>
    /// <param name="length">At most <see cref="ArenaFree"/>.</param>
    /// <returns>The bytes to fill, uninitialised.</returns>
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

    /// <summary>References memory without copying it. Internal: callers go through <c>RamBlock</c>, which checks bounds.</summary>
    internal void AddReference(byte* address, int length)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        AddSegment(address, length);
    }

    /// <summary>
    /// Adds an eight-byte header and a reference behind it in one step: what a RAM record is made of, a quarter of a million times a GiB.
    /// The caller has asked <see cref="HasRoom"/>.
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

    /// <summary>The bytes of one range.</summary>
    /// <param name="index">0 to <see cref="Count"/> - 1.</param>
    /// <returns>A view; guest memory may change underfoot.</returns>
    public ReadOnlySpan<byte> Segment(int index)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)index, (uint)Count);
        // SAFETY: index checked; the range was valid when added and stays so until Clear.
        return new ReadOnlySpan<byte>(_segments.Start(_next + index), checked((int)_segments.Length(_next + index)));
    }

    /// <summary>Forgets all ranges.</summary>
    public void Clear()
    {
        _count = _next = _arenaUsed = 0;
        PendingBytes = 0;
    }

    /// <summary>One writev or pwritev of what is left; advances past what the kernel took.</summary>
    /// <param name="fd">The descriptor.</param>
    /// <param name="offset">File offset for a positioned write, or a negative number for a plain one.</param>
    /// <param name="errno">The failure, or none.</param>
    /// <returns>Bytes written, or -1.</returns>
    internal long WriteOnce(OwnedFd fd, long offset, out Errno errno)
    {
        long n = _segments.Write(fd, _next, Count, offset, out errno);
        if (n >= 0) Advance(n);
        return n;
    }

    /// <summary>Like <see cref="WriteOnce"/> for a socket: never raises SIGPIPE.</summary>
    internal long SendOnce(OwnedFd fd, out Errno errno)
    {
        long n = _segments.Send(fd, _next, Count, out errno);
        if (n >= 0) Advance(n);
        return n;
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
            // SAFETY: _count - 1 is a valid entry. Neighbouring ranges join, so runs of header bytes cost one entry.
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
