using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

/// <summary>Every C library signature of the product, once; grouped by header in partial files. Wrappers with EINTR handling sit in <see cref="Posix"/>.</summary>
internal static partial class LibC
{
    private const string Library = "libc";

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int close(int fd);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint read(OwnedFd fd, ref byte buf, nuint count);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint write(OwnedFd fd, ref readonly byte buf, nuint count);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint pread(OwnedFd fd, ref byte buf, nuint count, long offset);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint pwrite(OwnedFd fd, ref readonly byte buf, nuint count, long offset);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint writev(OwnedFd fd, nint iov, int iovcnt);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint pwritev(OwnedFd fd, nint iov, int iovcnt, long offset);

    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial OwnedFd open(string path, int flags, int mode);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int fsync(OwnedFd fd);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int ftruncate(OwnedFd fd, long length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial long lseek(OwnedFd fd, long offset, int whence);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int fcntl(OwnedFd fd, int command, nint argument);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int fcntl(int fd, int command, nint argument);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int pipe2([Out, MarshalAs(UnmanagedType.LPArray, SizeConst = 2)] int[] fds, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial OwnedFd eventfd(uint initial, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int poll(ref PollFd fds, nuint count, int timeoutMs);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int fstat(OwnedFd fd, ref StatBuffer buffer);

    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int chmod(string path, uint mode);

    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int link(string path, string newPath);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial uint umask(uint mask);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial long syscall(long number, long a, long b, long c, long d, long e);

    [LibraryImport(Library)]
    internal static partial int getpgrp();

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int kill(int pid, int signal);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int ioctl(OwnedFd fd, nuint request, ref int argument);

    [LibraryImport(Library, EntryPoint = "ioctl", SetLastError = true)]
    internal static partial int ioctl_value(OwnedFd fd, nuint request, nint argument);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint splice(OwnedFd fd_in, nint off_in, OwnedFd fd_out, nint off_out, nuint len, uint flags);

    /// <summary>struct pollfd.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct PollFd
    {
        internal int Fd;
        internal short Events;
        internal short Revents;
    }

    /// <summary>struct stat of x86-64 Linux; only the members used are named.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 144)]
    internal struct StatBuffer
    {
        [FieldOffset(0)] internal ulong Device;
        [FieldOffset(8)] internal ulong Inode;
        [FieldOffset(24)] internal uint Mode;
        [FieldOffset(28)] internal uint UserId;
        [FieldOffset(40)] internal ulong SpecialDevice;
        [FieldOffset(48)] internal long SizeBytes;
        [FieldOffset(56)] internal long BlockBytes;
    }
}
