using System.Net;
using System.Net.Sockets;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Channels;

/// <summary>
/// The listening sockets of one address: a name or an empty host can stand for several IP addresses, of both families (QEMU: <c>QIONetListener</c>). Disposing
/// it wakes a waiting accept and removes the UNIX socket file that it made.
/// </summary>
internal sealed class MigrationListener : IDisposable
{
    /// <summary>Connections that the kernel queues. They are accepted at once, so this bounds only a burst.</summary>
    private const int Backlog = 512;

    /// <summary>How often to let the kernel choose a port that is free for all addresses.</summary>
    private const int PortChoices = 20;

    private readonly UnixListener? _unix;
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly MigrationAddress _address;
    private volatile bool _stopped;

    private MigrationListener(IReadOnlyList<OwnedFd> sockets, MigrationAddress address, UnixListener? unix = null)
    {
        (Sockets, _address, _unix) = (sockets, address, unix);
        foreach (OwnedFd socket in sockets) Posix.SetNonBlocking(socket, true);
        Addresses = [.. sockets.Select(AddressOf)];
    }

    /// <summary>The sockets; connections may wait on each.</summary>
    internal IReadOnlyList<OwnedFd> Sockets { get; }

    /// <summary>The bound address of each socket.</summary>
    internal IReadOnlyList<MigrationAddress> Addresses { get; }

    /// <summary>For a wait on the sockets and what was accepted on them.</summary>
    internal Epoll Events { get; } = new();

    /// <summary>Readable once <see cref="Stop"/> was called.</summary>
    internal OwnedFd Stopped => _wake;

    /// <summary>Binds and listens.</summary>
    /// <exception cref="ChannelException">The address is in use or belongs to another host.</exception>
    internal static MigrationListener Listen(MigrationAddress address)
    {
        if (address.Transport == MigrationTransport.Unix) return ListenUnix(address);
        Errno errno = Errno.EADDRNOTAVAIL;
        IReadOnlyList<IPAddress> ips = MigrationConnector.Resolve(address);
        // As in QEMU, [::] alone stands for both families.
        bool takesIPv4 = MigrationConnector.AllowsIPv4(address) && !ips.Contains(IPAddress.Any);
        for (int port = address.Port; port <= (address.ToPort ?? address.Port); port++)
        {
            // The port that is free for the first address may be taken for the second.
            for (int choice = 0; choice < (port == 0 ? PortChoices : 1); choice++)
            {
                if (TryListen(ips, port, takesIPv4, out errno) is { } sockets) return new MigrationListener(sockets, address);
            }
        }
        throw new ChannelException($"Failed to listen on '{address.Host}:{address.Port}': {Posix.Describe(errno)}", errno);
    }

    /// <summary>Takes a connection that waits on one of <see cref="Sockets"/>; null with an errno if there is none.</summary>
    internal SocketChannel? TryAccept(OwnedFd socket, out Errno errno) => Posix.Accept(socket, out errno) is { } peer
        ? new SocketChannel(peer, _address.ToString(), _address.Transport == MigrationTransport.Tcp) : null;

    /// <summary>Waits for the next connection on a UNIX socket, for protocols other than migration; null once stopped.</summary>
    internal OwnedFd? AcceptFd()
    {
        while (!_stopped)
        {
            Posix.Poll(Sockets[0], Posix.POLLIN, _wake, -1, out bool woken);
            if (woken || _stopped) return null;
            OwnedFd? peer = Posix.Accept(Sockets[0], out Errno errno);
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
        _unix?.Dispose();
        foreach (OwnedFd socket in Sockets) socket.Dispose();
        Events.Dispose();
        _wake.Dispose();
    }

    /// <summary>
    /// Listens on all addresses with the same port, or on none: with half of them, half of the sources would reach another process. Addresses that this host
    /// does not have are left out, as long as one is left.
    /// </summary>
    private static List<OwnedFd>? TryListen(IReadOnlyList<IPAddress> ips, int port, bool takesIPv4, out Errno errno)
    {
        errno = Errno.EADDRNOTAVAIL;
        var sockets = new List<OwnedFd>();
        foreach (IPAddress ip in ips)
        {
            if (MigrationConnector.TrySocket(ip) is not { } fd) continue;
            Posix.ReuseAddress(fd);
            if (ip.AddressFamily == AddressFamily.InterNetworkV6) Posix.TakeOnlyIPv6(fd, !takesIPv4);
            Errno failed = Posix.Bind(fd, Posix.InetAddress(ip, port == 0 && sockets.Count > 0 ? Posix.LocalEndPoint(sockets[0])!.Port : port));
            if (failed == Errno.None) failed = Posix.Listen(fd, Backlog);
            if (failed == Errno.None)
            {
                sockets.Add(fd);
                continue;
            }
            fd.Dispose();
            errno = failed;
            if (failed != Errno.EADDRINUSE) continue;
            sockets.ForEach(static s => s.Dispose());
            return null;
        }
        return sockets.Count > 0 ? sockets : null;
    }

    private static MigrationListener ListenUnix(MigrationAddress address)
    {
        try
        {
            var unix = UnixListener.ListenAnywhere(address.Path, Backlog);
            return new MigrationListener([unix.Socket], address, unix);
        }
        catch (ConfigurationException e)
        {
            throw new ChannelException($"Failed to listen on '{address.Path}': {e.Message}", Errno.EADDRINUSE, e);
        }
    }

    private MigrationAddress AddressOf(OwnedFd socket) => Posix.LocalEndPoint(socket) is { } at
        ? new() { Transport = MigrationTransport.Tcp, Host = at.Address.ToString(), Port = at.Port }
        : new() { Transport = MigrationTransport.Unix, Path = _address.Path };
}
