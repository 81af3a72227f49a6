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

    /// <summary>EAFNOSUPPORT: this host lacks the address family.</summary>
    private const Errno NoSuchFamily = (Errno)97;

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
            if (TrySocket(ip) is not { } fd) continue;
            last = Posix.Connect(fd, Posix.InetAddress(ip, address.Port), wake, ConnectTimeoutMs);
            if (last == Errno.None) return new SocketChannel(fd, address.ToString(), tcp: true);
            fd.Dispose();
            if (last == Errno.ECANCELED) break;
        }
        throw Unreachable($"{address.Host}:{address.Port}", last);
    }

    /// <summary>
    /// The IP addresses of a TCP address, of the families that its options <c>ipv4</c> and <c>ipv6</c> leave: one that is on switches the other off, unless
    /// both are on (QEMU: <c>inet_ai_family_from_address</c>). An empty host means every address of this host.
    /// </summary>
    /// <exception cref="ConfigurationException">Both families are off.</exception>
    /// <exception cref="ChannelException">The name is not known, or has no address of these families.</exception>
    internal static IReadOnlyList<IPAddress> Resolve(MigrationAddress address)
    {
        bool ipv4 = AllowsIPv4(address), ipv6 = address.IPv6 ?? (address.IPv4 != true);
        if (!ipv4 && !ipv6) throw new ConfigurationException("Cannot disable IPv4 and IPv6 at same time");
        try
        {
            IPAddress[] all = address.Host.Length == 0 ? [IPAddress.Any, IPAddress.IPv6Any]
                : IPAddress.TryParse(address.Host, out IPAddress? literal) ? [literal] : [.. Dns.GetHostAddresses(address.Host).Distinct()];
            IPAddress[] usable = [.. all.Where(ip => ip.AddressFamily == AddressFamily.InterNetwork ? ipv4 : ipv6)];
            return usable.Length > 0 ? usable : throw new ChannelException($"address resolution failed for {address.Host}:{address.Port}: no usable address", Errno.EADDRNOTAVAIL);
        }
        catch (SocketException e)
        {
            throw new ChannelException($"address resolution failed for {address.Host}:{address.Port}: {e.Message}", Errno.EADDRNOTAVAIL, e);
        }
    }

    internal static bool AllowsIPv4(MigrationAddress address) => address.IPv4 ?? (address.IPv6 != true);

    /// <summary>Makes a socket for an address; null if this host lacks the family.</summary>
    internal static OwnedFd? TrySocket(IPAddress ip)
    {
        try
        {
            return Posix.Socket(ip.AddressFamily == AddressFamily.InterNetworkV6 ? Posix.AF_INET6 : Posix.AF_INET);
        }
        catch (ChannelException e) when (e.Errno == NoSuchFamily)
        {
            return null;
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
