using System.Runtime.InteropServices;
using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// A fixed number of memory ranges for one gather write. Not thread-safe. The caller keeps the memory of a range mapped until the write is done, and
/// passes only indexes below the capacity: no method checks them.
/// </summary>
internal readonly unsafe struct IoVector(int capacity) : IDisposable
{
    // SAFETY: freed in Dispose, once, by the owner of the vector.
    private readonly iovec* _ranges = (iovec*)NativeMemory.Alloc((nuint)capacity, (nuint)sizeof(iovec));

    internal byte* Start(int index) => (byte*)_ranges[index].iov_base;

    internal long Length(int index) => (long)(ulong)_ranges[index].iov_len;

    internal void Set(int index, byte* start, long length)
    {
        // SAFETY: the owner's index is below the capacity.
        _ranges[index].iov_base = start;
        _ranges[index].iov_len = (size_t)(ulong)length;
    }

    /// <summary>Calls writev once, or pwritev if the offset is not negative; retries EINTR.</summary>
    /// <returns>Number of bytes written, or -1.</returns>
    internal long Write(OwnedFd fd, int first, int count, long offset, out Errno errno)
    {
        while (true)
        {
            // SAFETY: the owner set the ranges first..first+count.
            nint n = offset < 0 ? LibCExtra.writev(fd, _ranges + first, count) : LibCExtra.pwritev(fd, _ranges + first, count, offset);
            errno = n >= 0 ? Errno.None : Posix.LastError;
            if (errno != Errno.EINTR) return n;
        }
    }

    /// <summary>Calls sendmsg once, without SIGPIPE; retries EINTR.</summary>
    /// <returns>Number of bytes sent, or -1.</returns>
    internal long Send(OwnedFd fd, int first, int count, out Errno errno)
    {
        // SAFETY: as in Write; the message is on this frame.
        var message = new msghdr { msg_iov = _ranges + first, msg_iovlen = count };
        while (true)
        {
            nint n = LibCExtra.sendmsg(fd, &message, Posix.MSG_NOSIGNAL);
            errno = n >= 0 ? Errno.None : Posix.LastError;
            if (errno != Errno.EINTR) return n;
        }
    }

    /// <summary>Calls recvmsg once to fill the ranges in order; retries EINTR.</summary>
    /// <returns>Number of bytes received, 0 at the end of the stream, or -1.</returns>
    internal long Receive(OwnedFd fd, int first, int count, int flags, out Errno errno)
    {
        // SAFETY: as in Write; the caller has made sure that the ranges may be written.
        var message = new msghdr { msg_iov = _ranges + first, msg_iovlen = count };
        while (true)
        {
            nint n = LibCExtra.recvmsg(fd, &message, flags);
            errno = n >= 0 ? Errno.None : Posix.LastError;
            if (errno != Errno.EINTR) return n;
        }
    }

    // SAFETY: see the field.
    public void Dispose() => NativeMemory.Free(_ranges);
}
