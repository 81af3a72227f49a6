using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

// sys/epoll.h
internal static partial class LibC
{
    [LibraryImport(Library, SetLastError = true)]
    internal static partial OwnedFd epoll_create1(int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int epoll_ctl(OwnedFd epoll, int operation, OwnedFd fd, ref EpollEvent epollEvent);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int epoll_wait(OwnedFd epoll, ref EpollEvent events, int maxEvents, int timeoutMs);

    /// <summary>struct epoll_event of x86-64 Linux: packed.</summary>
    [StructLayout(LayoutKind.Sequential, Pack = 4)]
    internal struct EpollEvent
    {
        internal uint Events;
        internal ulong Data;
    }
}
