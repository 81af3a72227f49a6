using System.Net;
using System.Net.Sockets;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Tests.Faults;

/// <summary>
/// A relay for TCP and UNIX sockets between a client and a server. It carries bytes and, over UNIX sockets, descriptors; every connection of the client becomes
/// one to the server. Its <see cref="FaultSession"/> says where the bytes stop and what happens then. <see cref="Dispose"/> ends everything.
/// </summary>
internal sealed class FaultProxy : IDisposable
{
    private readonly Socket _listener;
    private readonly EndPoint _server;
    private readonly string? _path;
    private readonly Role? _role;
    private readonly Task _accepting;
    private readonly List<ProxyConnection> _connections = [];
    private readonly Func<FaultSession> _session;
    private volatile bool _ended;

    /// <summary>Listens.</summary>
    /// <param name="server">Where to connect for each client: <c>tcp:HOST:PORT</c> or <c>unix:PATH</c>.</param>
    /// <param name="path">A path to listen at; null for a free port of the loopback address.</param>
    /// <param name="session">The session of the moment; a long-lived proxy gets a new one with each attempt.</param>
    /// <param name="role">The role of all connections; null to tell main and data channels of a migration by their first bytes.</param>
    internal FaultProxy(string server, string? path, Func<FaultSession> session, Role? role = null)
    {
        (_server, _path, _session, _role) = (EndPointOf(server), path, session, role);
        _listener = NewSocket(path is null ? new IPEndPoint(IPAddress.Loopback, 0) : new UnixDomainSocketEndPoint(path), out EndPoint at);
        _listener.Bind(at);
        _listener.Listen(16);
        Uri = path is null ? $"tcp:{(IPEndPoint)_listener.LocalEndPoint!}" : $"unix:{path}";
        _accepting = WorkerThread.Run("proxy/accept", Accept);
    }

    /// <summary>Where clients connect.</summary>
    internal string Uri { get; }

    /// <summary>The address of a migration URI.</summary>
    internal static EndPoint EndPointOf(string uri) => uri.Split(':', 2) switch
    {
        ["tcp", var host] => IPEndPoint.Parse(host),
        ["unix", var path] => new UnixDomainSocketEndPoint(path),
        _ => throw new ArgumentException($"'{uri}' is no tcp: or unix: address"),
    };

    /// <summary>Lets the connections that are there count for another attempt.</summary>
    internal void Arm(FaultSession session, Role role)
    {
        lock (_connections)
        {
            _connections.RemoveAll(static c => c.IsClosed);
            _connections.ForEach(c => c.Arm(session, role));
        }
    }

    public void Dispose()
    {
        _ended = true;
        // A blocked accept does not notice that its socket is closed, but a shutdown wakes it.
        _listener.Shutdown(SocketShutdown.Both);
        _listener.Dispose();
        _accepting.Wait();
        lock (_connections) _connections.ForEach(static c => c.Dispose());
        if (_path is not null) File.Delete(_path);
    }

    private static Socket NewSocket(EndPoint end, out EndPoint same)
    {
        same = end;
        return end is UnixDomainSocketEndPoint ? new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified)
            : new Socket(end.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
    }

    private void Accept()
    {
        while (!_ended)
        {
            Socket client;
            try
            {
                client = _listener.Accept();
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return;
            }
            Socket server = NewSocket(_server, out EndPoint to);
            try
            {
                server.Connect(to);
            }
            catch (SocketException)
            {
                // Nobody listens there; the client learns it as it would without a relay, only later.
                server.Dispose();
                client.LingerState = new LingerOption(true, 0);
                client.Dispose();
                continue;
            }
            var connection = new ProxyConnection(client, server, _session(), _role);
            lock (_connections)
            {
                _connections.RemoveAll(static c => c.IsClosed);
                _connections.Add(connection);
            }
            connection.Start();
        }
    }
}
