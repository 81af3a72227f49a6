using System.Runtime.InteropServices;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// Safe shapes over <see cref="LibC"/>: EINTR retried, descriptors as <see cref="OwnedFd"/>, failure as <see cref="Errno"/>. Nothing here
/// throws for an operating system failure; callers decide.
/// </summary>
internal static partial class Posix
{
    /// <summary>The kernel's id of the calling thread.</summary>
    internal static int ThreadId => LibC.gettid();

    internal const int O_RDONLY = 0, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0x40, O_EXCL = 0x80, O_TRUNC = 0x200, O_NONBLOCK = 0x800,
        O_NOCTTY = 0x100, O_CLOEXEC = 0x80000, O_DIRECTORY = 0x10000, O_NOFOLLOW = 0x20000;

    internal const short POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16, POLLNVAL = 32;
    private const int F_GETFD = 1, F_SETFD = 2, F_GETFL = 3, F_SETFL = 4, F_DUPFD_CLOEXEC = 1030, FD_CLOEXEC = 1;
    private const int AddSeals = 1033, GetSeals = 1034, SealSeal = 1, SealShrink = 2, SealGrow = 4;
    internal const int S_IFMT = 0xF000, S_IFSOCK = 0xC000, S_IFREG = 0x8000, S_IFIFO = 0x1000, S_IFCHR = 0x2000;

    internal static Errno LastError => (Errno)Marshal.GetLastPInvokeError();

    internal static string Describe(Errno errno) => Marshal.GetPInvokeErrorMessage((int)errno);

    /// <summary>Turns a failed call into an exception that names the object.</summary>
    internal static ChannelException Error(string what, Errno errno) => new($"{what}: {Describe(errno)}", errno);

    internal static int Read(OwnedFd fd, Span<byte> into, out Errno errno)
    {
        while (true)
        {
            nint n = LibC.read(fd, ref MemoryMarshal.GetReference(into), (nuint)into.Length);
            if (n >= 0) { errno = Errno.None; return (int)n; }
            errno = LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    internal static int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno)
    {
        while (true)
        {
            nint n = LibC.write(fd, in MemoryMarshal.GetReference(from), (nuint)from.Length);
            if (n >= 0) { errno = Errno.None; return (int)n; }
            errno = LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    internal static int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno)
    {
        while (true)
        {
            nint n = LibC.pread(fd, ref MemoryMarshal.GetReference(into), (nuint)into.Length, offset);
            if (n >= 0) { errno = Errno.None; return (int)n; }
            errno = LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    internal static int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno)
    {
        while (true)
        {
            nint n = LibC.pwrite(fd, in MemoryMarshal.GetReference(from), (nuint)from.Length, offset);
            if (n >= 0) { errno = Errno.None; return (int)n; }
            errno = LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    /// <summary>Opens a file; close-on-exec always.</summary>
    internal static OwnedFd? Open(string path, int flags, int mode, out Errno errno)
    {
        while (true)
        {
            OwnedFd fd = LibC.open(path, flags | O_CLOEXEC, mode);
            if (!fd.IsInvalid) { errno = Errno.None; return fd; }
            errno = LastError;
            fd.Dispose();
            if (errno != Errno.EINTR) return null;
        }
    }

    internal static Errno Fsync(OwnedFd fd) => LibC.fsync(fd) == 0 ? Errno.None : LastError;

    internal static Errno Truncate(OwnedFd fd, long lengthBytes) => LibC.ftruncate(fd, lengthBytes) == 0 ? Errno.None : LastError;

    internal static long Seek(OwnedFd fd, long offset) => LibC.lseek(fd, offset, 0);

    /// <summary>First byte at or after an offset that is backed by data; -1 when only a hole follows, -2 when the descriptor cannot tell.</summary>
    internal static long SeekData(OwnedFd fd, long offset)
    {
        long at = LibC.lseek(fd, offset, 3 /* SEEK_DATA */);
        return at >= 0 ? at : LastError == Errno.ENXIO ? -1 : -2;
    }

    /// <summary>First hole at or after an offset inside data; the end of the file counts as one. -2 when the descriptor cannot tell.</summary>
    internal static long SeekHole(OwnedFd fd, long offset)
    {
        long at = LibC.lseek(fd, offset, 4 /* SEEK_HOLE */);
        return at >= 0 ? at : -2;
    }

    internal static (OwnedFd Read, OwnedFd Write) Pipe()
    {
        int[] fds = new int[2];
        if (LibC.pipe2(fds, O_CLOEXEC) != 0) throw Error("pipe", LastError);
        return (new OwnedFd(fds[0]), new OwnedFd(fds[1]));
    }

    /// <summary>Asks for a pipe of a size; the kernel may refuse.</summary>
    internal static void SetPipeSize(OwnedFd pipe, int bytes) => LibC.fcntl(pipe, 1031 /* F_SETPIPE_SZ */, bytes);

    internal static OwnedFd EventFd()
    {
        OwnedFd fd = LibC.eventfd(0, O_CLOEXEC | O_NONBLOCK);
        return fd.IsInvalid ? throw Error("eventfd", LastError) : fd;
    }

    internal static void SignalEventFd(OwnedFd fd)
    {
        Span<byte> one = stackalloc byte[8];
        one[0] = 1;
        Write(fd, one, out _);
    }

    internal static void DrainEventFd(OwnedFd fd)
    {
        Span<byte> value = stackalloc byte[8];
        Read(fd, value, out _);
    }

    /// <summary>Waits for events on one descriptor, or on a second one that wakes the waiter. Negative timeout: no limit.</summary>
    /// <returns>The returned events of <paramref name="fd"/>; 0 after a timeout or when only <paramref name="wake"/> fired.</returns>
    internal static short Poll(OwnedFd fd, short events, OwnedFd? wake, int timeoutMs, out bool woken)
    {
        Span<LibC.PollFd> fds = stackalloc LibC.PollFd[2];
        bool first = false, second = false;
        try
        {
            fd.DangerousAddRef(ref first);
            wake?.DangerousAddRef(ref second);
            fds[0] = new LibC.PollFd { Fd = fd.Number, Events = events };
            fds[1] = new LibC.PollFd { Fd = wake?.Number ?? -1, Events = POLLIN };
            long start = Environment.TickCount64;
            while (true)
            {
                int n = LibC.poll(ref fds[0], 2, timeoutMs < 0 ? -1 : (int)Math.Max(0, timeoutMs - (Environment.TickCount64 - start)));
                if (n < 0 && LastError == Errno.EINTR) continue;
                woken = fds[1].Revents != 0;
                return n <= 0 ? (short)0 : fds[0].Revents;
            }
        }
        finally
        {
            if (first) fd.DangerousRelease();
            if (second) wake!.DangerousRelease();
        }
    }

    /// <summary>File type bits, size and inode of an open descriptor.</summary>
    internal static Errno Stat(OwnedFd fd, out LibC.StatBuffer stat)
    {
        stat = default;
        return LibC.fstat(fd, ref stat) == 0 ? Errno.None : LastError;
    }

    internal static void SetNonBlocking(OwnedFd fd, bool on)
    {
        int flags = LibC.fcntl(fd, F_GETFL, 0);
        LibC.fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK);
    }

    /// <summary>O_RDONLY, O_WRONLY or O_RDWR as the descriptor was opened; -1 on error.</summary>
    internal static int AccessMode(OwnedFd fd)
    {
        int flags = LibC.fcntl(fd, F_GETFL, 0);
        return flags < 0 ? -1 : flags & 3;
    }

    internal static void SetCloseOnExec(OwnedFd fd, bool on) => LibC.fcntl(fd, F_SETFD, on ? FD_CLOEXEC : 0);

    internal static bool IsOpen(int fd) => LibC.fcntl(fd, F_GETFD, 0) >= 0;

    /// <summary>Duplicates a descriptor, close-on-exec set.</summary>
    internal static OwnedFd Duplicate(OwnedFd fd)
    {
        int copy = LibC.fcntl(fd, F_DUPFD_CLOEXEC, 3);
        return copy < 0 ? throw Error("dup", LastError) : new OwnedFd(copy);
    }

    /// <summary>Duplicates a descriptor known by number only, e.g. one inherited from the parent process.</summary>
    internal static OwnedFd? DuplicateNumber(int fd, out Errno errno)
    {
        int copy = LibC.fcntl(fd, F_DUPFD_CLOEXEC, 3);
        errno = copy < 0 ? LastError : Errno.None;
        return copy < 0 ? null : new OwnedFd(copy);
    }

    /// <summary>Whether a file can never become shorter.</summary>
    internal static bool IsSealedAgainstShrinking(OwnedFd file) => LibC.fcntl(file, GetSeals, 0) is var seals and >= 0 && (seals & SealShrink) != 0;

    /// <summary>Fixes the size of a memfd for good, and that no seal is added later.</summary>
    internal static Errno SealSize(OwnedFd memfd) => LibC.fcntl(memfd, AddSeals, SealSeal | SealShrink | SealGrow) >= 0 ? Errno.None : LastError;

    internal static Errno Chmod(string path, uint mode) => LibC.chmod(path, mode) == 0 ? Errno.None : LastError;

    /// <summary>Gives a file a second name; EEXIST when that is taken.</summary>
    internal static Errno Link(string path, string newPath) => LibC.link(path, newPath) == 0 ? Errno.None : LastError;

    /// <summary>Whether two descriptors are one open file, as after passing one twice (kcmp(2)); false also where the kernel does not tell.</summary>
    internal static bool IsSameFile(OwnedFd a, OwnedFd b)
    {
        const long kcmp = 312, file = 0;
        return LibC.syscall(kcmp, Environment.ProcessId, Environment.ProcessId, file, a.Number, b.Number) == 0;
    }
}
