using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

public static partial class Posix
{
    /// <summary>Makes a stream socket, blocking and close-on-exec.</summary>
    /// <param name="family">E.g. <see cref="AF_UNIX"/>.</param>
    /// <returns>The socket; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static OwnedFd Socket(int family)
    {
        int fd = LibC.socket(family, LibC.SOCK_STREAM | LibC.SOCK_CLOEXEC, 0);
        return fd >= 0 ? new OwnedFd(fd) : throw Error("socket", LastError);
    }

    /// <summary>Makes two connected UNIX stream sockets, blocking and close-on-exec.</summary>
    /// <returns>Both ends; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public static unsafe (OwnedFd First, OwnedFd Second) SocketPair()
    {
        // SAFETY: the kernel writes two numbers into this frame.
        int* fds = stackalloc int[2];
        if (LibC.socketpair(AF_UNIX, LibC.SOCK_STREAM | LibC.SOCK_CLOEXEC, 0, fds) != 0) throw Error("socketpair", LastError);
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

    /// <summary>Longest path of a UNIX socket; with its terminator it has 108 bytes.</summary>
    internal const int MaxUnixPathBytes = 107;

    /// <summary>Builds a sockaddr_un from a path of 1 to 107 bytes of UTF-8.</summary>
    /// <exception cref="ConfigurationException">The path is empty or longer.</exception>
    public static byte[] UnixAddress(string path)
    {
        byte[] name = Encoding.UTF8.GetBytes(path);
        if (name.Length is 0 or > MaxUnixPathBytes) throw new ConfigurationException($"UNIX socket path '{path}' must have 1 to {MaxUnixPathBytes} bytes, it has {name.Length}");
        byte[] bytes = new byte[2 + name.Length + 1];
        bytes[0] = (byte)AF_UNIX;
        name.CopyTo(bytes, 2);
        return bytes;
    }

    /// <summary>
    /// Connects to a UNIX socket as <see cref="Connect"/> does. A path over <see cref="MaxUnixPathBytes"/> is reached through an open directory, so that only
    /// the file's name must be short.
    /// </summary>
    /// <exception cref="ConfigurationException">The file's name is too long.</exception>
    internal static Errno ConnectUnix(OwnedFd fd, string path, OwnedFd? wake, int timeoutMs)
    {
        if (Encoding.UTF8.GetByteCount(path) <= MaxUnixPathBytes) return Connect(fd, UnixAddress(path), wake, timeoutMs);
        using OwnedFd? folder = Open(Path.GetDirectoryName(path) is { Length: > 0 } name ? name : ".", O_PATH | O_DIRECTORY, 0, out Errno errno);
        return folder is null ? errno : Connect(fd, UnixAddressIn(folder, path), wake, timeoutMs);
    }

    /// <summary>The address of a socket by its name in an open directory; valid while the directory is open.</summary>
    internal static byte[] UnixAddressIn(OwnedFd folder, string path)
    {
        string shortPath = $"/proc/self/fd/{folder.Number}/{Path.GetFileName(path)}";
        return UnixAddress(Encoding.UTF8.GetByteCount(shortPath) <= MaxUnixPathBytes ? shortPath : path);
    }

    internal static unsafe Errno Bind(OwnedFd fd, byte[] address)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the address is pinned for the call.
        fixed (byte* bytes = address) return LibC.bind(use.Number, (sockaddr*)bytes, address.Length) == 0 ? Errno.None : LastError;
    }

    internal static Errno Listen(OwnedFd fd, int backlog)
    {
        using FdInUse use = fd.Use();
        return LibC.listen(use.Number, backlog) == 0 ? Errno.None : LastError;
    }

    /// <summary>
    /// Connects. A blocked connect ends with <see cref="Errno.ECANCELED"/> when <paramref name="wake"/> fires, and with ETIMEDOUT after the timeout.
    /// </summary>
    public static Errno Connect(OwnedFd fd, byte[] address, OwnedFd? wake, int timeoutMs)
    {
        SetNonBlocking(fd, true);
        Errno errno = StartConnect(fd, address);
        if (errno != Errno.None)
        {
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

    /// <summary>Waits for the next client of a listening socket; a shutdown of the socket ends the wait.</summary>
    /// <returns>The connection, the caller's; null with an errno.</returns>
    public static unsafe OwnedFd? Accept(OwnedFd listener, out Errno errno)
    {
        using FdInUse use = listener.Use();
        while (true)
        {
            // SAFETY: no address is asked for.
            int fd = LibC.accept4(use.Number, null, null, LibC.SOCK_CLOEXEC);
            errno = fd >= 0 ? Errno.None : LastError;
            if (errno is not (Errno.EINTR or Errno.ECONNABORTED)) return fd >= 0 ? new OwnedFd(fd) : null;
        }
    }

    /// <summary>Returns the address that a socket is bound to; null for a UNIX socket.</summary>
    internal static unsafe IPEndPoint? LocalEndPoint(OwnedFd fd)
    {
        Span<byte> address = stackalloc byte[128];
        socklen_t length = address.Length;
        using FdInUse use = fd.Use();
        // SAFETY: the kernel writes at most length bytes, and the span is on this frame.
        fixed (byte* bytes = address)
        {
            if (LibC.getsockname(use.Number, (sockaddr*)bytes, &length) != 0) return null;
        }
        int family = BinaryPrimitives.ReadUInt16LittleEndian(address), port = BinaryPrimitives.ReadUInt16BigEndian(address[2..]);
        return family == AF_INET ? new IPEndPoint(new IPAddress(address.Slice(4, 4)), port)
            : family == AF_INET6 ? new IPEndPoint(new IPAddress(address.Slice(8, 16)), port)
            : null;
    }

    internal static Errno SocketError(OwnedFd fd) => (Errno)GetOption(fd, LibC.SOL_SOCKET, LibC.SO_ERROR);

    /// <summary>Whether a descriptor is a socket.</summary>
    public static bool IsSocket(OwnedFd fd) => Stat(fd, out FileStatus status) == Errno.None && status.IsSocket;

    /// <summary>A silent TCP peer is probed after so many seconds, so often, at this interval; after the last probe without an answer the connection is dead.</summary>
    private const int KeepAliveIdleS = 10, KeepAliveProbes = 4, KeepAliveIntervalS = 5;

    /// <summary>Sends small messages at once, and lets the kernel notice within 30 s that an idle peer is gone.</summary>
    internal static void TuneTcp(OwnedFd fd)
    {
        SetOption(fd, LibC.IPPROTO_TCP, LibC.TCP_NODELAY, 1);
        SetOption(fd, LibC.SOL_SOCKET, LibC.SO_KEEPALIVE, 1);
        SetOption(fd, LibC.IPPROTO_TCP, LibC.TCP_KEEPIDLE, KeepAliveIdleS);
        SetOption(fd, LibC.IPPROTO_TCP, LibC.TCP_KEEPINTVL, KeepAliveIntervalS);
        SetOption(fd, LibC.IPPROTO_TCP, LibC.TCP_KEEPCNT, KeepAliveProbes);
    }

    /// <summary>Enlarges the send buffer of a socket, beyond the system's limit if this process may. A refusal changes nothing.</summary>
    public static void WidenSendBuffer(OwnedFd fd, int bytes)
    {
        SetOption(fd, LibC.SOL_SOCKET, LibC.SO_SNDBUF, bytes);
        SetOption(fd, LibC.SOL_SOCKET, LibC.SO_SNDBUFFORCE, bytes);
    }

    internal static void ReuseAddress(OwnedFd fd) => SetOption(fd, LibC.SOL_SOCKET, LibC.SO_REUSEADDR, 1);

    /// <summary>Says whether an IPv6 socket leaves IPv4's connections alone, so that a socket of each family can have the same port.</summary>
    internal static void TakeOnlyIPv6(OwnedFd fd, bool on) => SetOption(fd, LibC.IPPROTO_IPV6, LibC.IPV6_V6ONLY, on ? 1 : 0);

    /// <summary>Ends one or both directions of a connection (shutdown(2)); blocked calls on it return. <paramref name="how"/> is a SHUT_ constant.</summary>
    /// <returns>None, or why the kernel refused.</returns>
    public static Errno ShutdownSocket(OwnedFd fd, int how)
    {
        using FdInUse use = fd.Use();
        return LibC.shutdown(use.Number, how) == 0 ? Errno.None : LastError;
    }

    /// <summary>Returns the number of bytes written to a TCP socket that its peer has not acknowledged yet; -1 if the socket cannot tell.</summary>
    internal static int UnacknowledgedBytes(OwnedFd fd)
    {
        int bytes = 0;
        // TIOCOUTQ has the number of SIOCOUTQ, its name for sockets.
        return Ioctl.Invoke(fd, (uint)LibC.TIOCOUTQ, ref bytes, out _) == 0 ? bytes : -1;
    }

    /// <summary>Tells, without blocking, whether a socket has an error, or the peer closed it and all its bytes were read.</summary>
    internal static bool HasPeerClosed(OwnedFd fd, out Errno errno)
    {
        Span<byte> one = stackalloc byte[1];
        int n = Receive(fd, one, MSG_PEEK | MSG_DONTWAIT, out errno);
        if (n < 0 && errno == Errno.EAGAIN) errno = Errno.None;
        else if (n <= 0) return true;
        return false;
    }

    /// <summary>Sends what the socket takes without waiting.</summary>
    /// <returns>Bytes sent; -1 if the socket takes nothing now, or never again.</returns>
    internal static unsafe int SendNow(OwnedFd fd, ReadOnlySpan<byte> data)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = data) return (int)LibC.send(use.Number, bytes, data.Length, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    /// <summary>Receives from a socket (recv(2)).</summary>
    /// <returns>Bytes received, 0 after the peer has ended its direction; -1 with an errno.</returns>
    public static unsafe int Receive(OwnedFd fd, Span<byte> into, int flags, out Errno errno)
    {
        // SAFETY: the bytes are pinned for the call, and the kernel is told how many there are.
        fixed (byte* bytes = into)
        {
            while (true)
            {
                nint n = LibCExtra.recv(fd, bytes, (nuint)into.Length, flags);
                errno = n >= 0 ? Errno.None : LastError;
                if (errno != Errno.EINTR) return (int)n;
            }
        }
    }

    private static unsafe Errno StartConnect(OwnedFd fd, byte[] address)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the address is pinned for the call.
        fixed (byte* bytes = address) return LibC.connect(use.Number, (sockaddr*)bytes, address.Length) == 0 ? Errno.None : LastError;
    }

    private static unsafe int GetOption(OwnedFd fd, int level, int name)
    {
        using FdInUse use = fd.Use();
        int value = 0;
        socklen_t length = sizeof(int);
        // SAFETY: the kernel writes at most length bytes into the value on this frame.
        return LibC.getsockopt(use.Number, level, name, &value, &length) == 0 ? value : (int)LastError;
    }

    private static unsafe void SetOption(OwnedFd fd, int level, int name, int value)
    {
        using FdInUse use = fd.Use();
        // SAFETY: the kernel reads the value on this frame.
        _ = LibC.setsockopt(use.Number, level, name, &value, sizeof(int));
    }

    /// <summary>Sends bytes and at most 16 descriptors as SCM_RIGHTS on a UNIX socket.</summary>
    /// <returns>Bytes sent, perhaps not all, but all descriptors with the first; -1 with an errno.</returns>
    /// <exception cref="ArgumentOutOfRangeException">More than 16 descriptors.</exception>
    public static int SendWithFds(OwnedFd fd, ReadOnlySpan<byte> data, ReadOnlySpan<SafeHandle> fds, out Errno errno) => SendWithFds(fd, data, default, fds, out errno);

    /// <summary>As above, with a second part after the first, so that a header and a caller's buffer are sent by one call.</summary>
    /// <returns>Bytes of both parts sent, perhaps not all, but all descriptors with the first; -1 with an errno.</returns>
    /// <exception cref="ArgumentOutOfRangeException">More than 16 descriptors.</exception>
    public static unsafe int SendWithFds(OwnedFd fd, ReadOnlySpan<byte> data, ReadOnlySpan<byte> more, ReadOnlySpan<SafeHandle> fds, out Errno errno)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(fds.Length, MaxFds);
        byte* control = stackalloc byte[ControlBytes(MaxFds)];
        var header = (cmsghdr*)control;
        var numbers = new Span<int>(header + 1, MaxFds);
        int added = 0;
        try
        {
            for (; added < fds.Length; added++)
            {
                bool ok = false;
                fds[added].DangerousAddRef(ref ok);
                numbers[added] = (int)fds[added].DangerousGetHandle();
            }
            // SAFETY: both parts stay pinned for the call; control is on this frame and has room for a header and MaxFds descriptors.
            fixed (byte* bytes = data, moreBytes = more)
            {
                iovec* iov = stackalloc iovec[2];
                iov[0] = new() { iov_base = bytes, iov_len = data.Length };
                iov[1] = new() { iov_base = moreBytes, iov_len = more.Length };
                msghdr message = new() { msg_iov = iov, msg_iovlen = 2 };
                if (fds.Length > 0)
                {
                    *header = new() { cmsg_len = sizeof(cmsghdr) + (fds.Length * sizeof(int)), cmsg_level = LibC.SOL_SOCKET, cmsg_type = LibC.SCM_RIGHTS };
                    message.msg_control = control;
                    message.msg_controllen = ControlBytes(fds.Length);
                }
                while (true)
                {
                    nint n = LibCExtra.sendmsg(fd, &message, MSG_NOSIGNAL);
                    errno = n >= 0 ? Errno.None : LastError;
                    if (errno != Errno.EINTR) return (int)n;
                }
            }
        }
        finally
        {
            for (int i = 0; i < added; i++) fds[i].DangerousRelease();
        }
    }

    /// <summary>
    /// Receives bytes and the descriptors that came with them (close-on-exec). If the kernel truncated the control message, closes the descriptors and
    /// returns EMFILE.
    /// </summary>
    /// <param name="fd">A UNIX socket.</param>
    /// <param name="into">Takes the bytes.</param>
    /// <param name="received">Gets the descriptors, which are the caller's; EMFILE closes all that are in the list and empties it.</param>
    /// <param name="wait">False to return EAGAIN instead of waiting.</param>
    /// <param name="errno">None, or why the kernel refused.</param>
    /// <returns>Bytes received, 0 after the peer has ended its direction; -1 with an errno.</returns>
    public static unsafe int ReceiveWithFds(OwnedFd fd, Span<byte> into, List<OwnedFd> received, bool wait, out Errno errno)
    {
        int controlBytes = ControlBytes(MaxReceivedFds);
        byte* control = stackalloc byte[controlBytes];
        // SAFETY: as in SendWithFds; the kernel writes at most controlBytes bytes of control data and sets msg_controllen to what it wrote.
        fixed (byte* bytes = into)
        {
            iovec iov = new() { iov_base = bytes, iov_len = into.Length };
            msghdr message = new() { msg_iov = &iov, msg_iovlen = 1, msg_control = control, msg_controllen = controlBytes };
            nint n;
            while (true)
            {
                n = LibCExtra.recvmsg(fd, &message, LibC.MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
                errno = n >= 0 ? Errno.None : LastError;
                if (errno == Errno.EINTR) continue;
                if (n < 0) return -1;
                break;
            }
            for (int at = 0, end = (int)message.msg_controllen; end - at >= sizeof(cmsghdr);)
            {
                var part = (cmsghdr*)(control + at);
                int length = (int)part->cmsg_len;
                if (length < sizeof(cmsghdr) || length > end - at) break;
                if (part->cmsg_level == LibC.SOL_SOCKET && part->cmsg_type == LibC.SCM_RIGHTS)
                {
                    var numbers = new ReadOnlySpan<int>(part + 1, (length - sizeof(cmsghdr)) / sizeof(int));
                    foreach (int number in numbers) received.Add(new OwnedFd(number));
                }
                at += Align(length);
            }
            if ((message.msg_flags & LibC.MSG_CTRUNC) != 0)
            {
                foreach (OwnedFd one in received) one.Dispose();
                received.Clear();
                errno = Errno.EMFILE;
                return -1;
            }
            return (int)n;
        }
    }

    // The receive limit is higher than the send limit, so that the reader of a message can tell a peer how many are too many.
    private const int MaxFds = 16, MaxReceivedFds = 20;

    /// <summary>
    /// Length of a control message with descriptors. Tmds.LibC's macros are no use here: CMSG_LEN rounds up, which would send one descriptor as two, and
    /// CMSG_NXTHDR does not find a second message.
    /// </summary>
    private static unsafe int ControlBytes(int fds) => Align(sizeof(cmsghdr) + (fds * sizeof(int)));

    private static int Align(int bytes) => (bytes + 7) & ~7;
}
