using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

internal static partial class Posix
{
    internal const int AF_UNIX = 1, AF_INET = 2, AF_INET6 = 10, SOCK_STREAM = 1, SOCK_NONBLOCK = 0x800, SOCK_CLOEXEC = 0x80000;
    internal const int SHUT_RD = 0, SHUT_WR = 1, SHUT_RDWR = 2;
    internal const int MSG_PEEK = 2, MSG_NOSIGNAL = 0x4000, MSG_DONTWAIT = 0x40, MSG_CMSG_CLOEXEC = 0x40000000, MSG_CTRUNC = 8;
    private const int SOL_SOCKET = 1, SO_REUSEADDR = 2, SO_ERROR = 4, SO_SNDBUF = 7, SO_KEEPALIVE = 9, SO_SNDBUFFORCE = 32, IPPROTO_TCP = 6, TCP_NODELAY = 1;
    private const uint SIOCOUTQ = 0x5411;

    internal static OwnedFd Socket(int family)
    {
        OwnedFd fd = LibC.socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        return fd.IsInvalid ? throw Error("socket", LastError) : fd;
    }

    internal static (OwnedFd First, OwnedFd Second) SocketPair()
    {
        int[] fds = new int[2];
        if (LibC.socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) throw Error("socketpair", LastError);
        return (new OwnedFd(fds[0]), new OwnedFd(fds[1]));
    }

    /// <summary>Builds a sockaddr_in or sockaddr_in6.</summary>
    internal static byte[] InetAddress(IPAddress address, int port)
    {
        byte[] bytes = new byte[address.AddressFamily == AddressFamily.InterNetworkV6 ? 28 : 16];
        BinaryPrimitives.WriteUInt16LittleEndian(bytes, (ushort)(bytes.Length == 28 ? AF_INET6 : AF_INET));
        BinaryPrimitives.WriteUInt16BigEndian(bytes.AsSpan(2), (ushort)port);
        if (bytes.Length == 28)
        {
            address.TryWriteBytes(bytes.AsSpan(8), out _);
            BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(24), (uint)address.ScopeId);
        }
        else
        {
            address.TryWriteBytes(bytes.AsSpan(4), out _);
        }
        return bytes;
    }

    /// <summary>Longest path of a UNIX socket; 108 with the terminator.</summary>
    internal const int MaxUnixPathBytes = 107;

    /// <summary>Builds a sockaddr_un; at most <see cref="MaxUnixPathBytes"/> of path.</summary>
    internal static byte[] UnixAddress(string path)
    {
        byte[] name = Encoding.UTF8.GetBytes(path);
        if (name.Length is 0 or > MaxUnixPathBytes) throw new ConfigurationException($"UNIX socket path '{path}' must have 1 to {MaxUnixPathBytes} bytes, it has {name.Length}");
        byte[] bytes = new byte[2 + name.Length + 1];
        bytes[0] = AF_UNIX;
        name.CopyTo(bytes, 2);
        return bytes;
    }

    internal static Errno Bind(OwnedFd fd, byte[] address) => LibC.bind(fd, in address[0], (uint)address.Length) == 0 ? Errno.None : LastError;

    internal static Errno Listen(OwnedFd fd, int backlog) => LibC.listen(fd, backlog) == 0 ? Errno.None : LastError;

    /// <summary>Connects; a blocked connect ends with <see cref="Errno.ECANCELED"/> when <paramref name="wake"/> fires or ETIMEDOUT after the timeout.</summary>
    internal static Errno Connect(OwnedFd fd, byte[] address, OwnedFd? wake, int timeoutMs)
    {
        SetNonBlocking(fd, true);
        if (LibC.connect(fd, in address[0], (uint)address.Length) != 0)
        {
            Errno errno = LastError;
            if (errno is not (Errno.EINPROGRESS or Errno.EINTR)) return errno;
            short events = Poll(fd, POLLOUT, wake, timeoutMs, out bool woken);
            if (woken) return Errno.ECANCELED;
            if (events == 0) return Errno.ETIMEDOUT;
            errno = SocketError(fd);
            if (errno != Errno.None) return errno;
        }
        SetNonBlocking(fd, false);
        return Errno.None;
    }

    internal static OwnedFd? Accept(OwnedFd listener, out Errno errno)
    {
        while (true)
        {
            OwnedFd fd = LibC.accept4(listener, 0, 0, SOCK_CLOEXEC);
            if (!fd.IsInvalid) { errno = Errno.None; return fd; }
            errno = LastError;
            fd.Dispose();
            if (errno is not (Errno.EINTR or Errno.ECONNABORTED)) return null;
        }
    }

    /// <summary>The address a socket is bound to; null for UNIX sockets.</summary>
    internal static IPEndPoint? LocalEndPoint(OwnedFd fd)
    {
        byte[] address = new byte[128];
        uint length = 128;
        if (LibC.getsockname(fd, ref address[0], ref length) != 0) return null;
        int port = BinaryPrimitives.ReadUInt16BigEndian(address.AsSpan(2));
        return BinaryPrimitives.ReadUInt16LittleEndian(address) switch
        {
            AF_INET => new IPEndPoint(new IPAddress(address.AsSpan(4, 4)), port),
            AF_INET6 => new IPEndPoint(new IPAddress(address.AsSpan(8, 16)), port),
            _ => null,
        };
    }

    internal static Errno SocketError(OwnedFd fd) => (Errno)GetOption(fd, SOL_SOCKET, SO_ERROR);

    internal static bool IsSocket(OwnedFd fd) => Stat(fd, out LibC.StatBuffer stat) == Errno.None && (stat.Mode & S_IFMT) == S_IFSOCK;

    internal static void TuneStream(OwnedFd fd, bool tcp, bool keepAlive)
    {
        if (tcp) SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        if (keepAlive) SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    }

    /// <summary>Lets more bytes wait in a socket, past the system's limit where this process may; a refusal leaves what there is.</summary>
    internal static void WidenSendBuffer(OwnedFd fd, int bytes)
    {
        SetOption(fd, SOL_SOCKET, SO_SNDBUF, bytes);
        SetOption(fd, SOL_SOCKET, SO_SNDBUFFORCE, bytes);
    }

    internal static void ReuseAddress(OwnedFd fd) => SetOption(fd, SOL_SOCKET, SO_REUSEADDR, 1);

    internal static Errno ShutdownSocket(OwnedFd fd, int how) => LibC.shutdown(fd, how) == 0 ? Errno.None : LastError;

    /// <summary>Bytes written to a TCP socket that its peer has not acknowledged yet; -1 where the socket cannot tell.</summary>
    internal static int UnacknowledgedBytes(OwnedFd fd)
    {
        int bytes = 0;
        return LibC.ioctl(fd, SIOCOUTQ, ref bytes) == 0 ? bytes : -1;
    }

    /// <summary>Looks at a socket without blocking: true after an orderly end with nothing left to read, or after an error.</summary>
    internal static bool HasPeerClosed(OwnedFd fd, out Errno errno)
    {
        Span<byte> one = stackalloc byte[1];
        int n = Receive(fd, one, MSG_PEEK | MSG_DONTWAIT, out errno);
        if (n < 0 && errno == Errno.EAGAIN) errno = Errno.None;
        else if (n <= 0) return true;
        return false;
    }

    internal static int Receive(OwnedFd fd, Span<byte> into, int flags, out Errno errno)
    {
        while (true)
        {
            nint n = LibC.recv(fd, ref MemoryMarshal.GetReference(into), (nuint)into.Length, flags);
            if (n >= 0) { errno = Errno.None; return (int)n; }
            errno = LastError;
            if (errno != Errno.EINTR) return -1;
        }
    }

    private static int GetOption(OwnedFd fd, int level, int name)
    {
        int value = 0;
        uint length = 4;
        return LibC.getsockopt(fd, level, name, ref value, ref length) == 0 ? value : (int)LastError;
    }

    private static void SetOption(OwnedFd fd, int level, int name, int value) => LibC.setsockopt(fd, level, name, in value, 4);

    /// <summary>Sends bytes with descriptors as SCM_RIGHTS on a UNIX socket; at most 16 descriptors.</summary>
    internal static int SendWithFds(OwnedFd fd, ReadOnlySpan<byte> data, ReadOnlySpan<SafeHandle> fds, out Errno errno) => SendWithFds(fd, data, default, fds, out errno);

    /// <summary>As above, with a second part behind the first, so that a header and somebody else's buffer leave in one call.</summary>
    internal static unsafe int SendWithFds(OwnedFd fd, ReadOnlySpan<byte> data, ReadOnlySpan<byte> more, ReadOnlySpan<SafeHandle> fds, out Errno errno)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(fds.Length, MaxFds);
        byte* control = stackalloc byte[ControlBytes];
        var numbers = new Span<int>(control + 16, MaxFds);
        int added = 0;
        try
        {
            for (; added < fds.Length; added++)
            {
                bool ok = false;
                fds[added].DangerousAddRef(ref ok);
                numbers[added] = (int)fds[added].DangerousGetHandle();
            }
            // SAFETY: both parts stay pinned for the call; control is on this frame and holds one cmsghdr (16 bytes) and the descriptors.
            fixed (byte* bytes = data, moreBytes = more)
            {
                LibC.IoVec* iov = stackalloc LibC.IoVec[2];
                iov[0] = new() { Base = (nint)bytes, Length = (nuint)data.Length };
                iov[1] = new() { Base = (nint)moreBytes, Length = (nuint)more.Length };
                LibC.MsgHdr message = new() { Iov = (nint)iov, IovLength = 2 };
                if (fds.Length > 0)
                {
                    *(nuint*)control = (nuint)(16 + (4 * fds.Length));
                    *(int*)(control + 8) = SOL_SOCKET;
                    *(int*)(control + 12) = 1;
                    message.Control = (nint)control;
                    message.ControlLength = (nuint)(16 + (((4 * fds.Length) + 7) & ~7));
                }
                while (true)
                {
                    nint n = LibC.sendmsg(fd, (nint)(&message), MSG_NOSIGNAL);
                    if (n >= 0) { errno = Errno.None; return (int)n; }
                    errno = LastError;
                    if (errno != Errno.EINTR) return -1;
                }
            }
        }
        finally
        {
            for (int i = 0; i < added; i++) fds[i].DangerousRelease();
        }
    }

    /// <summary>Receives bytes and the descriptors that came with them (close-on-exec). A truncated control message closes all and reports EMFILE.</summary>
    internal static unsafe int ReceiveWithFds(OwnedFd fd, Span<byte> into, List<OwnedFd> received, bool wait, out Errno errno)
    {
        byte* control = stackalloc byte[ControlBytes];
        // SAFETY: as in SendWithFds; the kernel writes at most ControlLength bytes of control data.
        fixed (byte* bytes = into)
        {
            LibC.IoVec iov = new() { Base = (nint)bytes, Length = (nuint)into.Length };
            LibC.MsgHdr message = new() { Iov = (nint)(&iov), IovLength = 1, Control = (nint)control, ControlLength = ControlBytes };
            nint n;
            while (true)
            {
                n = LibC.recvmsg(fd, (nint)(&message), MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
                if (n >= 0) break;
                errno = LastError;
                if (errno != Errno.EINTR) return -1;
            }
            nuint at = 0;
            while (message.ControlLength >= at + 16)
            {
                nuint length = *(nuint*)(control + at);
                if (length < 16 || at + length > message.ControlLength) break;
                if (*(int*)(control + at + 8) == SOL_SOCKET && *(int*)(control + at + 12) == 1)
                    for (nuint i = 16; i + 4 <= length; i += 4) received.Add(new OwnedFd(*(int*)(control + at + i)));
                at += (length + 7) & ~(nuint)7;
            }
            if ((message.Flags & MSG_CTRUNC) != 0)
            {
                foreach (OwnedFd one in received) one.Dispose();
                received.Clear();
                errno = Errno.EMFILE;
                return -1;
            }
            errno = Errno.None;
            return (int)n;
        }
    }

    private const int MaxFds = 16;
    private const int ControlBytes = 16 + (4 * MaxFds) + 16;
}
