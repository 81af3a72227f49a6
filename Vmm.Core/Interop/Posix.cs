using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// Safe wrappers of the C library. They retry EINTR, use <see cref="OwnedFd"/> for descriptors, and report a failure as <see cref="Errno"/> so that
/// the caller decides what it means; only methods that cannot return an errno throw. Thread-safe.
/// </summary>
public static partial class Posix
{
    /// <summary>The kernel's id of the calling thread.</summary>
    public static int ThreadId => LibCExtra.gettid();

    internal static Errno LastError => (Errno)Marshal.GetLastPInvokeError();

    /// <summary>The C library's text for an error, such as <c>No such device</c>.</summary>
    public static string Describe(Errno errno) => Marshal.GetPInvokeErrorMessage((int)errno);

    /// <summary>Makes an exception for a failed call that names the object.</summary>
    public static ChannelException Error(string what, Errno errno) => new($"{what}: {Describe(errno)}", errno);

    /// <summary>Reads from a descriptor (read(2)); blocks if the descriptor does.</summary>
    /// <returns>Bytes read, 0 at the end; -1 with an errno.</returns>
    public static unsafe int Read(OwnedFd fd, Span<byte> into, out Errno errno)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = into)
        {
            while (true)
            {
                int n = (int)LibC.read(use.Number, bytes, into.Length);
                errno = n >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return n;
            }
        }
    }

    /// <summary>Writes to a descriptor (write(2)); blocks if the descriptor does.</summary>
    /// <returns>Bytes written, perhaps not all; -1 with an errno.</returns>
    public static unsafe int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = from)
        {
            while (true)
            {
                int n = (int)LibC.write(use.Number, bytes, from.Length);
                errno = n >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return n;
            }
        }
    }

    /// <summary>Reads at an offset and leaves the file position alone (pread(2)).</summary>
    /// <returns>Bytes read, 0 at the end; -1 with an errno.</returns>
    public static unsafe int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = into)
        {
            while (true)
            {
                int n = (int)LibC.pread(use.Number, bytes, into.Length, offset);
                errno = n >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return n;
            }
        }
    }

    /// <summary>Writes at an offset and leaves the file position alone (pwrite(2)).</summary>
    /// <returns>Bytes written, perhaps not all; -1 with an errno.</returns>
    public static unsafe int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = from)
        {
            while (true)
            {
                int n = (int)LibC.pwrite(use.Number, bytes, from.Length, offset);
                errno = n >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return n;
            }
        }
    }

    /// <summary>Opens a file with close-on-exec (open(2)).</summary>
    /// <returns>The descriptor, the caller's; null with an errno.</returns>
    public static unsafe OwnedFd? Open(string path, int flags, int mode, out Errno errno)
    {
        // SAFETY: the path is zero-terminated and pinned for the call.
        fixed (byte* text = CString(path))
        {
            while (true)
            {
                int fd = LibC.open(text, flags | LibC.O_CLOEXEC, (ushort)mode);
                errno = fd >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return fd >= 0 ? new OwnedFd(fd) : null;
            }
        }
    }

    internal static Errno Fsync(OwnedFd fd)
    {
        using FdInUse use = fd.Use();
        return LibC.fsync(use.Number) == 0 ? Errno.None : LastError;
    }

    /// <summary>Syncs a directory, so that the names in it are on disk. Not every file system can; those report no error.</summary>
    internal static Errno SyncDirectory(string path, Func<OwnedFd, Errno> sync)
    {
        using OwnedFd? fd = Open(path, O_RDONLY | O_DIRECTORY, 0, out Errno errno);
        if (fd is not null) errno = sync(fd);
        return errno == Errno.EINVAL ? Errno.None : errno;
    }

    internal static Errno Truncate(OwnedFd fd, long lengthBytes)
    {
        using FdInUse use = fd.Use();
        return LibC.ftruncate(use.Number, lengthBytes) == 0 ? Errno.None : LastError;
    }

    internal static long Seek(OwnedFd fd, long offset) => Seek(fd, offset, LibC.SEEK_SET, out _);

    /// <summary>
    /// Returns the offset of the first data at or after an offset; -1 if only a hole follows, -2 if the descriptor cannot tell.
    /// </summary>
    internal static long SeekData(OwnedFd fd, long offset)
    {
        long at = Seek(fd, offset, 3 /* SEEK_DATA */, out Errno errno);
        return at >= 0 ? at : errno == Errno.ENXIO ? -1 : -2;
    }

    /// <summary>
    /// Returns the offset of the first hole at or after an offset inside data; the end of the file counts as a hole. -2 if the descriptor cannot tell.
    /// </summary>
    internal static long SeekHole(OwnedFd fd, long offset)
    {
        long at = Seek(fd, offset, 4 /* SEEK_HOLE */, out _);
        return at >= 0 ? at : -2;
    }

    /// <summary>Makes a pipe, both ends in blocking mode and close-on-exec.</summary>
    /// <returns>Both ends; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static unsafe (OwnedFd Read, OwnedFd Write) Pipe()
    {
        // SAFETY: the kernel writes two numbers into this frame.
        int* fds = stackalloc int[2];
        if (LibC.pipe2(fds, LibC.O_CLOEXEC) != 0) throw Error("pipe", LastError);
        return (new OwnedFd(fds[0]), new OwnedFd(fds[1]));
    }

    /// <summary>Number of bytes that were written to a pipe and not read yet, asked at either end; -1 if the descriptor cannot tell.</summary>
    internal static int UnreadBytes(OwnedFd pipe)
    {
        const uint fionread = 0x541B;
        int bytes = 0;
        return Ioctl.Invoke(pipe, fionread, ref bytes, out _) == 0 ? bytes : -1;
    }

    /// <summary>Requests a size for a pipe; the kernel may refuse.</summary>
    public static void SetPipeSize(OwnedFd pipe, int bytes) => Control(pipe, LibC.F_SETPIPE_SZ, bytes);

    /// <summary>Moves bytes between a pipe and a socket inside the kernel (splice(2)); blocks.</summary>
    /// <returns>Bytes moved, perhaps not all, 0 at the end of <paramref name="from"/>; -1 with an errno.</returns>
    public static unsafe int Splice(OwnedFd from, OwnedFd to, int count, out Errno errno)
    {
        using FdInUse source = from.Use(), target = to.Use();
        while (true)
        {
            // SAFETY: no offsets are given.
            int n = (int)LibC.splice(source.Number, null, target.Number, null, count, (uint)(LibC.SPLICE_F_MOVE | LibC.SPLICE_F_MORE));
            errno = n >= 0 ? Errno.None : LastError;
            if (errno != Errno.EINTR) return n;
        }
    }

    /// <summary>Makes an eventfd of 0, non-blocking and close-on-exec.</summary>
    /// <returns>The descriptor; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static OwnedFd EventFd()
    {
        int fd = LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
        return fd >= 0 ? new OwnedFd(fd) : throw Error("eventfd", LastError);
    }

    /// <summary>How many descriptors this process may have (RLIMIT_NOFILE).</summary>
    internal static long MaxOpenFiles => LibC.sysconf(4 /* _SC_OPEN_MAX, which Tmds.LibC lacks */);

    /// <summary>Adds 1 to an eventfd: whoever polls it wakes.</summary>
    public static void SignalEventFd(OwnedFd fd)
    {
        Span<byte> one = stackalloc byte[8];
        one[0] = 1;
        Write(fd, one, out _);
    }

    /// <summary>Sets an eventfd back to 0.</summary>
    public static void DrainEventFd(OwnedFd fd)
    {
        Span<byte> value = stackalloc byte[8];
        Read(fd, value, out _);
    }

    /// <summary>Waits for events on a descriptor, or until <paramref name="wake"/> is readable. A negative timeout waits without limit.</summary>
    /// <returns>The events of <paramref name="fd"/>; 0 after the timeout or if only <paramref name="wake"/> is readable.</returns>
    public static unsafe short Poll(OwnedFd fd, short events, OwnedFd? wake, int timeoutMs, out bool woken)
    {
        using FdInUse use = fd.Use(), wakeUse = new(wake);
        // SAFETY: two entries on this frame, which the kernel updates.
        pollfd* fds = stackalloc pollfd[2];
        fds[0] = new pollfd { fd = use.Number, events = events };
        fds[1] = new pollfd { fd = wakeUse.Number, events = LibC.POLLIN };
        long start = Environment.TickCount64;
        while (true)
        {
            int n = LibCExtra.poll(fds, 2, timeoutMs < 0 ? -1 : (int)Math.Max(0, timeoutMs - (Environment.TickCount64 - start)));
            if (n < 0 && LastError == Errno.EINTR) continue;
            woken = fds[1].revents != 0;
            return n <= 0 ? (short)0 : fds[0].revents;
        }
    }

    /// <summary>What fstat(2) says of an open descriptor.</summary>
    /// <returns>None, or why the kernel refused.</returns>
    public static unsafe Errno Stat(OwnedFd fd, out FileStatus status)
    {
        using FdInUse use = fd.Use();
        stat found;
        // SAFETY: the kernel fills in one structure on this frame.
        bool ok = LibC.fstat(use.Number, &found) == 0;
        status = ok ? new FileStatus(found.st_dev, found.st_ino, (ushort)found.st_mode, found.st_uid, found.st_rdev, found.st_size, found.st_blksize) : default;
        return ok ? Errno.None : LastError;
    }

    internal static void SetNonBlocking(OwnedFd fd, bool on)
    {
        int flags = Control(fd, LibC.F_GETFL, 0);
        Control(fd, LibC.F_SETFL, on ? flags | LibC.O_NONBLOCK : flags & ~LibC.O_NONBLOCK);
    }

    /// <summary>Returns the mode in which a descriptor was opened: O_RDONLY, O_WRONLY or O_RDWR; -1 on error.</summary>
    internal static int AccessMode(OwnedFd fd)
    {
        int flags = Control(fd, LibC.F_GETFL, 0);
        return flags < 0 ? -1 : flags & LibC.O_ACCMODE;
    }

    internal static void SetCloseOnExec(OwnedFd fd, bool on) => Control(fd, LibC.F_SETFD, on ? LibC.FD_CLOEXEC : 0);

    internal static bool IsOpen(int fd) => LibC.fcntl(fd, LibC.F_GETFD, 0) >= 0;

    /// <summary>Duplicates a descriptor, with close-on-exec.</summary>
    /// <returns>The copy; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static OwnedFd Duplicate(OwnedFd fd)
    {
        int copy = Control(fd, LibC.F_DUPFD_CLOEXEC, 3);
        return copy < 0 ? throw Error("dup", LastError) : new OwnedFd(copy);
    }

    /// <summary>Duplicates a descriptor by its number, e.g. one that the parent process left open.</summary>
    internal static OwnedFd? DuplicateNumber(int fd, out Errno errno)
    {
        int copy = LibC.fcntl(fd, LibC.F_DUPFD_CLOEXEC, 3);
        errno = copy < 0 ? LastError : Errno.None;
        return copy < 0 ? null : new OwnedFd(copy);
    }

    /// <summary>True if a file is sealed against shrinking.</summary>
    public static bool IsSealedAgainstShrinking(OwnedFd file) => Control(file, LibC.F_GET_SEALS, 0) is var seals and >= 0 && (seals & LibC.F_SEAL_SHRINK) != 0;

    /// <summary>Seals a memfd against changes of its size and against further seals.</summary>
    internal static Errno SealSize(OwnedFd memfd) =>
        Control(memfd, LibC.F_ADD_SEALS, LibC.F_SEAL_SEAL | LibC.F_SEAL_SHRINK | LibC.F_SEAL_GROW) >= 0 ? Errno.None : LastError;

    internal static unsafe Errno Chmod(string path, uint mode)
    {
        // SAFETY: the path is zero-terminated and pinned for the call.
        fixed (byte* text = CString(path)) return LibC.chmod(text, (ushort)mode) == 0 ? Errno.None : LastError;
    }

    internal static unsafe Errno MakeDirectory(string path, uint mode)
    {
        // SAFETY: the path is zero-terminated and pinned for the call.
        fixed (byte* text = CString(path)) return LibC.mkdir(text, (ushort)mode) == 0 ? Errno.None : LastError;
    }

    /// <summary>Renames a file or directory; with <paramref name="exchange"/> both must exist and swap their names in one step.</summary>
    internal static Errno Rename(string from, string to, bool exchange = false)
    {
        const int atCwd = -100;
        return LibCExtra.renameat2(atCwd, from, atCwd, to, exchange ? 2u : 0) == 0 ? Errno.None : LastError;
    }

    /// <summary>Locks an open file or directory (flock(2)) until the descriptor is closed; EAGAIN if another descriptor has the lock.</summary>
    internal static Errno TryLock(OwnedFd fd) => LibCExtra.flock(fd, 2 | 4 /* LOCK_EX | LOCK_NB */) == 0 ? Errno.None : LastError;

    /// <summary>Gives a file a second name; EEXIST if the name is taken.</summary>
    internal static unsafe Errno Link(string path, string newPath)
    {
        // SAFETY: both paths are zero-terminated and pinned for the call.
        fixed (byte* from = CString(path), to = CString(newPath)) return LibC.link(from, to) == 0 ? Errno.None : LastError;
    }

    /// <summary>
    /// True if two descriptors are the same open file, e.g. because a peer passed it twice (kcmp(2)); false if the kernel does not tell.
    /// </summary>
    public static bool IsSameFile(OwnedFd a, OwnedFd b)
    {
        const int kcmp = 312, file = 0;
        using FdInUse first = a.Use(), second = b.Use();
        return SystemCall(kcmp, Environment.ProcessId, Environment.ProcessId, file, first.Number, second.Number) == 0;
    }

    /// <summary>Sends a signal to a process.</summary>
    internal static Errno Kill(int pid, int signal) => LibC.kill(pid, signal) == 0 ? Errno.None : LastError;

    /// <summary>Replaces the program of this process; returns only if it fails.</summary>
    /// <param name="command">The program, which is searched for in PATH, and its arguments.</param>
    /// <param name="environment">Entries of the form NAME=value.</param>
    internal static Errno Execute(IReadOnlyList<string> command, IReadOnlyList<string> environment) => Execute(command[0], command, environment);

    /// <summary>As above, for a program that is told another name of itself as its first argument.</summary>
    internal static Errno Execute(string program, IReadOnlyList<string> arguments, IReadOnlyList<string> environment)
    {
        _ = LibCExtra.execvpe(program, [.. arguments, null], [.. environment, null]);
        return LastError;
    }

    /// <summary>Makes a system call for which the C library has no function; all arguments are numbers.</summary>
    internal static int SystemCall(int number, int a, int b, int c, int d = 0, int e = 0) => (int)LibC.syscall(number, a, b, c, d, e);

    private static long Seek(OwnedFd fd, long offset, int whence, out Errno errno)
    {
        using FdInUse use = fd.Use();
        long at = LibC.lseek(use.Number, offset, whence);
        errno = at >= 0 ? Errno.None : LastError;
        return at;
    }

    private static int Control(OwnedFd fd, int command, int argument)
    {
        using FdInUse use = fd.Use();
        return LibC.fcntl(use.Number, command, argument);
    }

    /// <summary>Encodes a text for the C library: UTF-8 with a terminating zero.</summary>
    private static byte[] CString(string text) => Encoding.UTF8.GetBytes(text + '\0');
}
