using System.Collections.Concurrent;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Channels;

/// <summary>Opens the channels of addresses. Calls block; a wake descriptor ends their wait.</summary>
internal static class MigrationConnector
{
    private const int ConnectTimeoutMs = 30_000;
    private const string FdSetPrefix = "/dev/fdset/";

    /// <summary>Opens a file, descriptor or command; returns null for sockets, which connect later.</summary>
    internal static IMigrationChannel? OpenAtOnce(MigrationAddress address, bool outgoing, Func<string, OwnedFd?>? takeNamedFd,
        Func<long, int, OwnedFd?>? openFdSet) => address.Transport switch
    {
        MigrationTransport.File when address.Path.StartsWith(FdSetPrefix, StringComparison.Ordinal) => FromFdSet(address, outgoing, openFdSet),
        MigrationTransport.File => FromPath(address, outgoing),
        MigrationTransport.Exec => ExecChannel.Start(address, outgoing),
        MigrationTransport.Fd => FromFd(address, outgoing, takeNamedFd),
        _ => null,
    };

    /// <summary>Connects a socket.</summary>
    /// <exception cref="ChannelException">The peer could not be reached; the text is QEMU's.</exception>
    internal static SocketChannel Connect(MigrationAddress address, OwnedFd wake)
    {
        if (address.Transport == MigrationTransport.Unix)
        {
            OwnedFd fd = Posix.Socket(Posix.AF_UNIX);
            Errno errno = Posix.ConnectUnix(fd, address.Path, wake, ConnectTimeoutMs);
            if (errno == Errno.None) return new SocketChannel(fd, address.ToString(), tcp: false);
            fd.Dispose();
            throw Unreachable(address.Path, errno);
        }
        Errno last = Errno.EHOSTUNREACH;
        foreach (IPAddress ip in Resolve(address))
        {
            OwnedFd fd = Posix.Socket(ip.AddressFamily == AddressFamily.InterNetworkV6 ? Posix.AF_INET6 : Posix.AF_INET);
            last = Posix.Connect(fd, Posix.InetAddress(ip, address.Port), wake, ConnectTimeoutMs);
            if (last == Errno.None) return new SocketChannel(fd, address.ToString(), tcp: true);
            fd.Dispose();
            if (last == Errno.ECANCELED) break;
        }
        throw Unreachable($"{address.Host}:{address.Port}", last);
    }

    internal static IReadOnlyList<IPAddress> Resolve(MigrationAddress address)
    {
        if (address.Host.Length == 0) return [address.IPv6 == true ? IPAddress.IPv6Any : IPAddress.Any];
        try
        {
            IPAddress[] all = IPAddress.TryParse(address.Host, out IPAddress? literal) ? [literal] : Dns.GetHostAddresses(address.Host);
            IPAddress[] usable = [.. all.Where(ip => ip.AddressFamily == AddressFamily.InterNetwork ? address.IPv4 != false : address.IPv6 != false)];
            return usable.Length > 0 ? usable : throw new ChannelException($"address resolution failed for {address.Host}:{address.Port}: no usable address", Errno.EADDRNOTAVAIL);
        }
        catch (SocketException e)
        {
            throw new ChannelException($"address resolution failed for {address.Host}:{address.Port}: {e.Message}", Errno.EADDRNOTAVAIL, e);
        }
    }

    private static ChannelException Unreachable(string where, Errno errno) => new($"Failed to connect to '{where}': {Posix.Describe(errno)}", errno);

    /// <summary>Opens a file, or a FIFO. Never waits for the other end of a FIFO.</summary>
    private static IMigrationChannel FromPath(MigrationAddress address, bool outgoing)
    {
        using OwnedFd? place = Posix.Open(address.Path, Posix.O_PATH, 0, out _);
        if (place is null || Posix.Stat(place, out FileStatus status) != Errno.None || !status.IsPipe)
            return outgoing ? FileChannel.Create(address.Path, address.OffsetBytes) : FileChannel.Open(address.Path, address.OffsetBytes);
        if (address.OffsetBytes != 0) throw new ConfigurationException($"'{address.Path}' is a FIFO, which has no offset {address.OffsetBytes}");
        OwnedFd? fd = Posix.Open(address.Path, (outgoing ? Posix.O_WRONLY : Posix.O_RDONLY) | Posix.O_NONBLOCK, 0, out Errno errno);
        if (fd is not null) return outgoing ? new PipeChannel(null, fd, address.ToString()) : new PipeChannel(fd, null, address.ToString());
        if (errno != Errno.ENXIO) throw new ChannelException($"Could not open '{address.Path}': {Posix.Describe(errno)}", errno);
        throw new ChannelException($"nobody reads the FIFO '{address.Path}'", errno) { Hint = "start its reader first" };
    }

    /// <summary>The set must contain a descriptor that was opened with exactly the needed access mode (qmp 8.2).</summary>
    private static FileChannel FromFdSet(MigrationAddress address, bool outgoing, Func<long, int, OwnedFd?>? openFdSet)
    {
        int access = outgoing ? Posix.O_WRONLY : Posix.O_RDONLY;
        if (!long.TryParse(address.Path.AsSpan(FdSetPrefix.Length), NumberStyles.None, CultureInfo.InvariantCulture, out long id))
            throw new ConfigurationException($"'{address.Path}' does not end in a descriptor set's number");
        OwnedFd fd = openFdSet?.Invoke(id, access)
            ?? throw new ConfigurationException($"Failed to find file descriptor with matching flags=0x{(outgoing ? access | Posix.O_CREAT : access):x}");
        return FileChannel.Wrap(fd, $"file:{address.Path}", address.OffsetBytes, cut: outgoing);
    }

    private static IMigrationChannel FromFd(MigrationAddress address, bool outgoing, Func<string, OwnedFd?>? takeNamedFd)
    {
        OwnedFd fd;
        if (int.TryParse(address.Path, NumberStyles.None, CultureInfo.InvariantCulture, out int number))
        {
            fd = Posix.DuplicateNumber(number, out Errno errno) ?? throw new ChannelException($"fd:{number}: {Posix.Describe(errno)}", errno);
        }
        else
        {
            fd = takeNamedFd?.Invoke(address.Path) ?? throw new ConfigurationException($"File descriptor named '{address.Path}' has not been found");
        }
        Posix.Stat(fd, out FileStatus stat);
        string name = address.ToString();
        if (stat.IsSocket) return new SocketChannel(fd, name, tcp: false);
        if (!stat.IsRegularFile) return outgoing ? new PipeChannel(null, fd, name) : new PipeChannel(fd, null, name);
        fd.Dispose();
        throw new ConfigurationException("fd: migration to a file is not supported. Use file: instead.");
    }
}

/// <summary>A listening socket for incoming migrations. Disposing it wakes a waiting accept and removes the UNIX socket file that it made.</summary>
internal sealed class MigrationListener : IDisposable
{
    private const int Backlog = 16;

    private readonly OwnedFd _fd;
    private readonly UnixListener? _unix;
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly MigrationAddress _address;
    private readonly ConcurrentQueue<SocketChannel> _givenBack = new();
    private volatile bool _stopped;

    private MigrationListener(OwnedFd fd, MigrationAddress address, UnixListener? unix = null)
    {
        _fd = fd;
        _unix = unix;
        _address = address;
        Posix.SetNonBlocking(fd, true);
        Address = address.Transport == MigrationTransport.Unix
            ? new MigrationAddress { Transport = MigrationTransport.Unix, Path = address.Path }
            : new MigrationAddress { Transport = MigrationTransport.Tcp, Host = Posix.LocalEndPoint(fd)?.Address.ToString() ?? string.Empty, Port = Posix.LocalEndPoint(fd)?.Port ?? 0 };
    }

    internal MigrationAddress Address { get; }

    /// <summary>Binds and listens.</summary>
    /// <exception cref="ChannelException">The address is in use or belongs to another host.</exception>
    internal static MigrationListener Listen(MigrationAddress address)
    {
        if (address.Transport == MigrationTransport.Unix) return ListenUnix(address);
        Errno errno = Errno.EADDRNOTAVAIL;
        foreach (IPAddress ip in MigrationConnector.Resolve(address))
        {
            for (int port = address.Port; port <= (address.ToPort ?? address.Port); port++)
            {
                OwnedFd fd = Posix.Socket(ip.AddressFamily == AddressFamily.InterNetworkV6 ? Posix.AF_INET6 : Posix.AF_INET);
                Posix.ReuseAddress(fd);
                errno = Posix.Bind(fd, Posix.InetAddress(ip, port));
                if (errno == Errno.None) errno = Posix.Listen(fd, Backlog);
                if (errno == Errno.None) return new MigrationListener(fd, address);
                fd.Dispose();
            }
        }
        throw new ChannelException($"Failed to listen on '{address.Host}:{address.Port}': {Posix.Describe(errno)}", errno);
    }

    /// <summary>Waits for a connection; null once stopped.</summary>
    internal SocketChannel? Accept() => Accept(-1, out _);

    /// <summary>As <see cref="Accept()"/>, for a limited time; -1 sets no limit. <paramref name="timedOut"/> tells a timeout from a stop.</summary>
    internal SocketChannel? Accept(int timeoutMs, out bool timedOut)
    {
        timedOut = false;
        if (!_stopped && _givenBack.TryDequeue(out SocketChannel? earlier)) return earlier;
        OwnedFd? peer = AcceptFd(_wake, timeoutMs);
        timedOut = peer is null && !_stopped;
        return peer is null ? null : Wrap(peer);
    }

    /// <summary>Waits until a connection comes, the time is over, or <paramref name="wake"/> is signalled. <see cref="Stop"/> does not end the wait.</summary>
    internal SocketChannel? AcceptOr(OwnedFd wake, int timeoutMs) => AcceptFd(wake, timeoutMs) is { } peer ? Wrap(peer) : null;

    /// <summary>Takes a connection back, which the next <see cref="Accept()"/> returns.</summary>
    internal void GiveBack(SocketChannel peer) => _givenBack.Enqueue(peer);

    private SocketChannel Wrap(OwnedFd peer) => new(peer, _address.ToString(), _address.Transport == MigrationTransport.Tcp);

    /// <summary>As <see cref="Accept()"/>, but returns the descriptor, for protocols other than migration.</summary>
    internal OwnedFd? AcceptFd() => AcceptFd(_wake, -1);

    private OwnedFd? AcceptFd(OwnedFd wake, int timeoutMs)
    {
        while (!_stopped)
        {
            short ready = Posix.Poll(_fd, Posix.POLLIN, wake, timeoutMs, out bool woken);
            if (woken || _stopped || ready == 0) return null;
            OwnedFd? peer = Posix.Accept(_fd, out Errno errno);
            if (peer is not null) return peer;
            if (errno != Errno.EAGAIN) throw Posix.Error($"cannot accept on {_address}", errno);
        }
        return null;
    }

    /// <summary>Makes a waiting accept return null. Any thread may call it.</summary>
    internal void Stop()
    {
        _stopped = true;
        if (!_wake.IsClosed) Posix.SignalEventFd(_wake);
    }

    public void Dispose()
    {
        Stop();
        while (_givenBack.TryDequeue(out SocketChannel? peer)) peer.Dispose();
        _unix?.Dispose();
        _fd.Dispose();
        _wake.Dispose();
    }

    private static MigrationListener ListenUnix(MigrationAddress address)
    {
        try
        {
            var unix = UnixListener.ListenAnywhere(address.Path, Backlog);
            return new MigrationListener(unix.Socket, address, unix);
        }
        catch (ConfigurationException e)
        {
            throw new ChannelException($"Failed to listen on '{address.Path}': {e.Message}", Errno.EADDRINUSE, e);
        }
    }
}
