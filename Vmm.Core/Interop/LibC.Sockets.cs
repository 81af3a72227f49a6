using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

internal static partial class LibC
{
    [LibraryImport(Library, SetLastError = true)]
    internal static partial OwnedFd socket(int domain, int type, int protocol);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int socketpair(int domain, int type, int protocol, [Out, MarshalAs(UnmanagedType.LPArray, SizeConst = 2)] int[] fds);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int connect(OwnedFd fd, ref readonly byte address, uint length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int bind(OwnedFd fd, ref readonly byte address, uint length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int listen(OwnedFd fd, int backlog);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial OwnedFd accept4(OwnedFd fd, nint address, nint length, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int getsockname(OwnedFd fd, ref byte address, ref uint length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int getsockopt(OwnedFd fd, int level, int name, ref int value, ref uint length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int setsockopt(OwnedFd fd, int level, int name, ref readonly int value, uint length);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int shutdown(OwnedFd fd, int how);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint recv(OwnedFd fd, ref byte buf, nuint count, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint sendmsg(OwnedFd fd, nint message, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint recvmsg(OwnedFd fd, nint message, int flags);

    /// <summary>struct msghdr.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct MsgHdr
    {
        internal nint Name;
        internal uint NameLength;
        internal nint Iov;
        internal nuint IovLength;
        internal nint Control;
        internal nuint ControlLength;
        internal int Flags;
    }

    /// <summary>struct iovec.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct IoVec
    {
        internal nint Base;
        internal nuint Length;
    }
}
