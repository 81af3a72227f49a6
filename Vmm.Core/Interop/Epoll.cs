using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// Waits until one of many descriptors is readable (epoll(7)). Any thread may add and remove descriptors; one thread waits.
/// </summary>
internal sealed unsafe class Epoll : IDisposable
{
    private const int MaxEvents = 64;

    private readonly OwnedFd _epoll;

    internal Epoll()
    {
        int fd = LibC.epoll_create1(LibC.EPOLL_CLOEXEC);
        _epoll = fd >= 0 ? new OwnedFd(fd) : throw Posix.Error("epoll_create1", Posix.LastError);
    }

    internal void Add(OwnedFd fd, ulong key) => Control(LibC.EPOLL_CTL_ADD, fd, key, LibC.EPOLLIN);

    /// <summary>Adds a socket that is reported once for all that has come so far, and again when more comes or its peer ends the connection.</summary>
    internal void AddEdges(OwnedFd fd, ulong key) => Control(LibC.EPOLL_CTL_ADD, fd, key, LibC.EPOLLIN | LibC.EPOLLRDHUP | unchecked((int)LibC.EPOLLET));

    internal void Remove(OwnedFd fd) => Control(LibC.EPOLL_CTL_DEL, fd, 0, 0);

    /// <summary>Waits until a descriptor is ready, the time is over, or <paramref name="wake"/> is readable; -1 sets no limit.</summary>
    /// <param name="keys">Receives the keys of the ready descriptors, at most 64.</param>
    /// <param name="wake">Ends the wait.</param>
    /// <param name="timeoutMs">Longest wait.</param>
    /// <param name="woken">True if <paramref name="wake"/> is readable.</param>
    internal int Wait(Span<ulong> keys, OwnedFd wake, int timeoutMs, out bool woken) =>
        Posix.Poll(_epoll, Posix.POLLIN, wake, timeoutMs, out woken) == 0 ? 0 : Collect(keys, 0);

    /// <summary>Waits without a timeout.</summary>
    /// <param name="keys">Receives the keys of the readable descriptors, at most 64.</param>
    internal int Wait(Span<ulong> keys) => Collect(keys, -1);

    private int Collect(Span<ulong> keys, int timeoutMs)
    {
        using FdInUse epoll = _epoll.Use();
        // SAFETY: the kernel writes at most MaxEvents entries into this frame.
        epoll_event* events = stackalloc epoll_event[MaxEvents];
        while (true)
        {
            int count = LibC.epoll_wait(epoll.Number, events, Math.Min(MaxEvents, keys.Length), timeoutMs);
            if (count >= 0)
            {
                for (int i = 0; i < count; i++) keys[i] = events[i].data.u64;
                return count;
            }
            Errno errno = Posix.LastError;
            if (errno != Errno.EINTR) throw Posix.Error("epoll_wait", errno);
        }
    }

    public void Dispose() => _epoll.Dispose();

    private void Control(int operation, OwnedFd fd, ulong key, int events)
    {
        using FdInUse epoll = _epoll.Use(), watched = fd.Use();
        var wanted = new epoll_event { events = events };
        wanted.data.u64 = key;
        // SAFETY: the event is on this frame.
        if (LibC.epoll_ctl(epoll.Number, operation, watched.Number, &wanted) != 0) throw Posix.Error("epoll_ctl", Posix.LastError);
    }
}
