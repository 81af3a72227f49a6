using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>Advice about a range of mapped memory (madvise(2)).</summary>
internal enum MemoryAdvice
{
    HugePages,
    NoHugePages,
    PopulateWrite,
    Remove,
}

public static partial class Posix
{
    /// <summary>Makes a memfd of zeros, sealed against changes of its size, so that an access to its mapping never faults.</summary>
    /// <returns>The descriptor; the caller's.</returns>
    /// <exception cref="ChannelException">The kernel refused the descriptor or the size.</exception>
    public static OwnedFd MemFd(string name, long lengthBytes)
    {
        OwnedFd fd = MemFd(name);
        Errno errno = Truncate(fd, lengthBytes);
        if (errno == Errno.None && Control(fd, LibC.F_ADD_SEALS, LibC.F_SEAL_SHRINK) < 0) errno = LastError;
        if (errno == Errno.None) return fd;
        fd.Dispose();
        throw Error($"memfd '{name}' of {lengthBytes} bytes", errno);
    }

    /// <summary>Makes an empty memfd that accepts seals.</summary>
    /// <returns>The descriptor; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static unsafe OwnedFd MemFd(string name)
    {
        // SAFETY: the name is zero-terminated and pinned for the call.
        fixed (byte* text = CString(name))
        {
            int fd = LibC.memfd_create(text, LibC.MFD_CLOEXEC | LibC.MFD_ALLOW_SEALING);
            return fd >= 0 ? new OwnedFd(fd) : throw Error($"memfd '{name}'", LastError);
        }
    }

    /// <summary>Maps a descriptor without reserving swap space.</summary>
    /// <returns>The address, or 0.</returns>
    internal static unsafe nint Map(OwnedFd fd, ulong lengthBytes, bool writable, bool shared, long offset, out Errno errno)
    {
        using FdInUse use = fd.Use();
        int protection = writable ? LibC.PROT_READ | LibC.PROT_WRITE : LibC.PROT_READ;
        int flags = (shared ? LibC.MAP_SHARED : LibC.MAP_PRIVATE) | LibC.MAP_NORESERVE;
        // SAFETY: the kernel chooses an unused address; the caller owns the mapping.
        void* address = LibC.mmap(null, (size_t)lengthBytes, protection, flags, use.Number, offset);
        errno = address == LibC.MAP_FAILED ? LastError : Errno.None;
        return address == LibC.MAP_FAILED ? 0 : (nint)address;
    }

    internal static unsafe bool Unmap(nint address, ulong lengthBytes)
    {
        // SAFETY: the caller owns the mapping and gives it up.
        return LibC.munmap((void*)address, (size_t)lengthBytes) == 0;
    }

    internal static unsafe Errno Advise(nint address, ulong lengthBytes, MemoryAdvice advice)
    {
        int number = advice switch
        {
            MemoryAdvice.HugePages => LibC.MADV_HUGEPAGE,
            MemoryAdvice.NoHugePages => LibC.MADV_NOHUGEPAGE,
            MemoryAdvice.Remove => LibC.MADV_REMOVE,
            // Newer than Tmds.LibC.
            _ => 23, // MADV_POPULATE_WRITE
        };
        // SAFETY: the caller owns the range.
        return LibC.madvise((void*)address, (size_t)lengthBytes, number) == 0 ? Errno.None : LastError;
    }
}
