using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Memory;

/// <summary>
/// One mmap'ed range, unmapped once. Every access is a bounds-checked span. Safe to use from several threads; the caller keeps it alive.
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

    /// <summary>False for a mapping that must not be written: writing to its spans ends the process.</summary>
    public bool IsWritable { get; }

    /// <summary>Maps a descriptor.</summary>
    /// <param name="fd">memfd, file or device.</param>
    /// <param name="lengthBytes">Bytes to map.</param>
    /// <param name="shared">MAP_SHARED when true, else MAP_PRIVATE.</param>
    /// <param name="offset">Page-aligned offset in the descriptor.</param>
    /// <param name="name">For error texts.</param>
    /// <param name="writable">PROT_WRITE as well as PROT_READ.</param>
    /// <returns>The mapping.</returns>
    /// <exception cref="ChannelException">mmap failed.</exception>
    public static MappedRegion Map(OwnedFd fd, ulong lengthBytes, bool shared, long offset, string name, bool writable = true)
    {
        ArgumentNullException.ThrowIfNull(fd);
        nint address = Posix.Map(fd, lengthBytes, writable, shared, offset, out Errno errno);
        return address == 0 ? throw Posix.Error($"cannot map {lengthBytes} bytes of {name}", errno) : new MappedRegion(address, lengthBytes, writable);
    }

    /// <summary>A view of part of the mapping; at most 2 GiB - 1 bytes.</summary>
    /// <param name="offset">From the start of the mapping.</param>
    /// <param name="length">Bytes.</param>
    /// <returns>The bytes; other threads may change them.</returns>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the mapping.</exception>
    public Span<byte> Slice(ulong offset, int length)
    {
        if (length < 0 || offset > LengthBytes || (ulong)length > LengthBytes - offset)
            throw new ArgumentOutOfRangeException(nameof(offset), $"range {offset:x}+{length:x} is outside a mapping of {LengthBytes:x} bytes");
        ObjectDisposedException.ThrowIf(IsClosed, this);
        // SAFETY: the range was checked against the mapping, which lives until this handle is disposed.
        return new Span<byte>(Address + offset, length);
    }

    /// <summary>Asks for huge pages, or against them. The kernel may decline; that is no error.</summary>
    /// <param name="huge">True for MADV_HUGEPAGE.</param>
    public void AdviseHugePages(bool huge) => Posix.Advise(handle, LengthBytes, huge ? MemoryAdvice.HugePages : MemoryAdvice.NoHugePages);

    /// <summary>Touches every page so that later accesses do not fault.</summary>
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
