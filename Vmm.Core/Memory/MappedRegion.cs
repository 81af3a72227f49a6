using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Memory;

/// <summary>
/// A range mapped with mmap and unmapped once. Access is by bounds-checked spans. Several threads may use it; the caller keeps it alive meanwhile.
/// </summary>
public sealed unsafe partial class MappedRegion : SafeHandle
{
    private MappedRegion(nint address, ulong lengthBytes, bool writable) : base(0, ownsHandle: true)
    {
        SetHandle(address);
        IsWritable = writable;
        LengthBytes = lengthBytes;
    }

    /// <summary>Length of the mapping.</summary>
    public ulong LengthBytes { get; }

    /// <inheritdoc/>
    public override bool IsInvalid => handle == 0;

    internal byte* Address => (byte*)handle;

    /// <summary>False for a read-only mapping: a write to one of its spans ends the process.</summary>
    public bool IsWritable { get; }

    /// <summary>Maps a descriptor.</summary>
    /// <param name="fd">A memfd, file or device.</param>
    /// <param name="lengthBytes">Bytes to map.</param>
    /// <param name="shared">True for MAP_SHARED, false for MAP_PRIVATE.</param>
    /// <param name="offset">Page-aligned offset in the descriptor.</param>
    /// <param name="name">Names the mapping in error messages.</param>
    /// <param name="writable">True to map with PROT_WRITE as well as PROT_READ.</param>
    /// <exception cref="ChannelException">mmap failed.</exception>
    public static MappedRegion Map(OwnedFd fd, ulong lengthBytes, bool shared, long offset, string name, bool writable = true)
    {
        ArgumentNullException.ThrowIfNull(fd);
        nint address = Posix.Map(fd, lengthBytes, writable, shared, offset, out Errno errno);
        return address == 0 ? throw Posix.Error($"cannot map {lengthBytes} bytes of {name}", errno) : new MappedRegion(address, lengthBytes, writable);
    }

    /// <summary>Returns a view of part of the mapping, at most 2 GiB - 1 bytes.</summary>
    /// <param name="offset">Offset in the mapping, bytes.</param>
    /// <param name="length">Length of the view, bytes.</param>
    /// <returns>The bytes; other threads may change them at any time.</returns>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the mapping.</exception>
    /// <exception cref="ObjectDisposedException">The mapping is gone.</exception>
    public Span<byte> Slice(ulong offset, int length)
    {
        if (length < 0 || offset > LengthBytes || (ulong)length > LengthBytes - offset)
            throw new ArgumentOutOfRangeException(nameof(offset), $"range {offset:x}+{length:x} is outside a mapping of {LengthBytes:x} bytes");
        ObjectDisposedException.ThrowIf(IsClosed, this);
        // SAFETY: the range was checked against the mapping, which lives until this handle is disposed.
        return new Span<byte>(Address + offset, length);
    }

    /// <summary>Advises the kernel to use huge pages, or not to; the kernel may ignore it.</summary>
    /// <param name="huge">True for MADV_HUGEPAGE, false for MADV_NOHUGEPAGE.</param>
    public void AdviseHugePages(bool huge) => Posix.Advise(handle, LengthBytes, huge ? MemoryAdvice.HugePages : MemoryAdvice.NoHugePages);

    /// <summary>Touches every page, so that later accesses do not fault.</summary>
    /// <exception cref="ChannelException">The kernel could not provide the memory.</exception>
    public void Populate()
    {
        Errno errno = Posix.Advise(handle, LengthBytes, MemoryAdvice.PopulateWrite);
        if (errno == Errno.None) return;
        if (errno != Errno.EINVAL) throw Posix.Error($"cannot preallocate {LengthBytes} bytes", errno);
        for (ulong at = 0; at < LengthBytes; at += 4096)
        {
            // SAFETY: at is inside the mapping. Kernels before 5.14 lack MADV_POPULATE_WRITE; an atomic add of 0 touches without changing.
            Interlocked.Add(ref *(int*)(Address + at), 0);
        }
    }

    /// <inheritdoc/>
    protected override bool ReleaseHandle() => Posix.Unmap(handle, LengthBytes);
}
