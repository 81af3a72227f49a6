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

    private readonly LibC.IoVec* _segments;
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
        // SAFETY: freed in Dispose; sizes are constants of this type.
        _segments = (LibC.IoVec*)NativeMemory.Alloc(MaxSegments, (nuint)sizeof(LibC.IoVec));
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
        _segments[_count] = new LibC.IoVec { Base = (nint)at, Length = 8 };
        _segments[_count + 1] = new LibC.IoVec { Base = (nint)address, Length = (nuint)length };
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
        LibC.IoVec* v = _segments + _next + index;
        return new ReadOnlySpan<byte>((void*)v->Base, checked((int)v->Length));
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
        while (true)
        {
            // SAFETY: _next.._count are valid entries.
            nint n = offset < 0
                ? LibC.writev(fd, (nint)(_segments + _next), Count)
                : LibC.pwritev(fd, (nint)(_segments + _next), Count, offset);
            if (n >= 0) { errno = Errno.None; Advance(n); return n; }
            errno = Posix.LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    /// <summary>Like <see cref="WriteOnce"/> for a socket: never raises SIGPIPE.</summary>
    internal long SendOnce(OwnedFd fd, out Errno errno)
    {
        while (true)
        {
            // SAFETY: the message and the entries it points to outlive the call.
            LibC.MsgHdr message = new() { Iov = (nint)(_segments + _next), IovLength = (nuint)Count };
            nint n = LibC.sendmsg(fd, (nint)(&message), Posix.MSG_NOSIGNAL);
            if (n >= 0) { errno = Errno.None; Advance(n); return n; }
            errno = Posix.LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        // SAFETY: allocated in the constructor, freed once.
        NativeMemory.Free(_segments);
        NativeMemory.Free(_arena);
    }

    private void AddSegment(byte* at, int length)
    {
        PendingBytes += length;
        if (_count > _next)
        {
            // SAFETY: _count - 1 is a valid entry. Neighbouring ranges join, so runs of header bytes cost one entry.
            LibC.IoVec* last = _segments + _count - 1;
            if (last->Base + (nint)last->Length == (nint)at) { last->Length += (nuint)length; return; }
        }
        if (_count == MaxSegments) throw new InvalidOperationException("gather list is full");
        // SAFETY: _count < MaxSegments.
        _segments[_count++] = new LibC.IoVec { Base = (nint)at, Length = (nuint)length };
    }

    private void Advance(nint written)
    {
        PendingBytes -= written;
        while (written > 0)
        {
            // SAFETY: the kernel never reports more than it was given, so _next stays below _count.
            LibC.IoVec* v = _segments + _next;
            if ((nuint)written < v->Length) { v->Base += written; v->Length -= (nuint)written; return; }
            written -= (nint)v->Length;
            _next++;
        }
        if (_next == _count) Clear();
    }
}
