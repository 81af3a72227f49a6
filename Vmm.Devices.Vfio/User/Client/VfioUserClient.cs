using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Answers what a server asks of its client; called on a receiver thread, without any lock.</summary>
internal interface IVfioUserDma
{
    /// <summary>Reads guest memory for the server.</summary>
    /// <returns>None; ENODEV outside the map or without bus mastering; EPERM without permission.</returns>
    Errno Read(ulong address, Span<byte> destination);

    /// <summary>Writes guest memory for the server and marks it dirty.</summary>
    /// <returns>As <see cref="Read"/>.</returns>
    Errno Write(ulong address, ReadOnlySpan<byte> source);
}

/// <summary>
/// Client end of one vfio-user connection (vfio-user 1, 2, 6). Any thread may send requests at any time. One thread per socket receives: it gives
/// each reply to the request with its id, and serves the server's DMA commands (vfio-user C-8). The first failure ends the connection: its reason
/// is stored, the sockets are shut down, and every request, now and later, ends with ENODEV.
/// </summary>
internal sealed partial class VfioUserClient : IDisposable
{
    private readonly VfioUserSocket _socket;
    private readonly IVfioUserDma _dma;
    private readonly Lock _gate = new();
    private readonly Dictionary<ushort, VfioUserExchange> _pending = [];
    private readonly Stack<VfioUserExchange> _pool = new();
    private readonly List<Task> _receivers = [];
    private readonly Timer _watchdog;
    private VfioUserSocket? _twin;
    private VmmException? _fault;
    private ushort _lastId;
    private int _senders;
    private long _sendProgressMs;
    private bool _disposed;
    private volatile bool _isMoving;

    /// <summary>Takes over a connected socket and negotiates.</summary>
    /// <param name="socket">A connected UNIX stream socket; owned, closed also when this throws.</param>
    /// <param name="name">For errors: the socket's path.</param>
    /// <param name="dma">Serves the server's DMA commands.</param>
    /// <param name="timeoutMs">Limit of a request.</param>
    /// <exception cref="VmmException">No connection, or the server does not speak our protocol.</exception>
    internal VfioUserClient(OwnedFd socket, string name, IVfioUserDma dma, int timeoutMs)
    {
        Name = name;
        TimeoutMs = timeoutMs;
        _dma = dma;
        _socket = new VfioUserSocket(socket, name);
        _watchdog = new Timer(static self => ((VfioUserClient)self!).CheckSenders(), this, timeoutMs, Math.Max(10, timeoutMs / 4));
        StartReceiver(_socket, "vfio-user");
        try
        {
            Server = Negotiate();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>
    /// Raised once, from the thread pool, when the connection ended otherwise than by <see cref="Dispose"/>. A handler may still run when
    /// <see cref="Dispose"/> returns.
    /// </summary>
    internal event Action<VmmException>? Lost;

    internal string Name { get; }

    /// <summary>Limit of an ordinary request.</summary>
    internal int TimeoutMs { get; }

    /// <summary>What the server said in VERSION.</summary>
    internal VfioUserVersion Server { get; }

    /// <summary>Whether DMA commands have a socket of their own.</summary>
    internal bool HasTwinSocket => _twin is not null;

    /// <summary>Most descriptors that one message to the server may carry.</summary>
    internal int MaxFds => Math.Min(Server.MaxMsgFds, VfioUserLimits.MessageFds);

    /// <summary>Largest count of one data message, both sides' limits applied.</summary>
    internal int MaxDataBytes => Math.Min(Server.MaxDataXferBytes, VfioUserLimits.DataXferBytes);

    /// <summary>Why the connection ended; null while it lasts.</summary>
    internal VmmException? Fault => Volatile.Read(ref _fault);

    /// <summary>Connects to a server's socket.</summary>
    /// <param name="path">1 to 107 bytes.</param>
    /// <param name="dma">Serves the server's DMA commands.</param>
    /// <param name="timeoutMs">Limit of the connect and of each request.</param>
    /// <returns>A negotiated connection.</returns>
    /// <exception cref="VmmException">No connection, or the server does not speak our protocol.</exception>
    internal static VfioUserClient Connect(string path, IVfioUserDma dma, int timeoutMs)
    {
        byte[] address = Posix.UnixAddress(path);
        OwnedFd fd = Posix.Socket(Posix.AF_UNIX);
        Errno errno = Posix.Connect(fd, address, null, timeoutMs);
        if (errno == Errno.None) return new VfioUserClient(fd, path, dma, timeoutMs);
        fd.Dispose();
        // A UNIX socket whose backlog is full answers EAGAIN: the server has a client already, and serves one at a time (vfio-user 7).
        throw errno == Errno.EAGAIN ? Busy(path) : Posix.Error($"vfio-user '{path}': connect", errno);
    }

    private static ChannelException Busy(string name) => new($"vfio-user '{name}': the server is busy with another client", Errno.EBUSY);

    /// <summary>Takes an exchange from the pool.</summary>
    /// <returns>Dispose to return it.</returns>
    internal VfioUserExchange Begin()
    {
        VfioUserExchange? exchange;
        lock (_gate) _pool.TryPop(out exchange);
        exchange ??= new VfioUserExchange(this);
        exchange.Rented();
        return exchange;
    }

    internal void Return(VfioUserExchange exchange)
    {
        lock (_gate)
        {
            if (_fault is null) _pool.Push(exchange);
        }
    }

    /// <summary>Sends a request; used by <see cref="VfioUserExchange"/>.</summary>
    internal Errno Send(VfioUserExchange exchange, Span<byte> message, ReadOnlySpan<byte> data, ReadOnlySpan<OwnedFd?> fds, bool noReply)
    {
        SafeHandle[]? handles = null;
        if (fds.Length > 0)
        {
            handles = new SafeHandle[fds.Length];
            for (int i = 0; i < fds.Length; i++) handles[i] = fds[i]!;
        }
        if (_replay is { } replay)
        {
            if (!noReply) replay.Reply(exchange, message[VfioUserHeader.Length..]);
            return Errno.None;
        }
        if (!Enter(exchange, message, message.Length + data.Length, noReply)) return Errno.ENODEV;
        return SendGuarded(_socket, message, handles, data) ? Errno.None : Errno.ENODEV;
    }

    /// <summary>Gives a request its id, adds it to those that wait for a reply, and writes the header.</summary>
    /// <returns>False when the connection is gone.</returns>
    private bool Enter(VfioUserExchange exchange, Span<byte> message, int sizeBytes, bool noReply)
    {
        lock (_gate)
        {
            if (_fault is not null || _suspended) return false;
            do exchange.Id = ++_lastId;
            while (_pending.ContainsKey(exchange.Id));
            if (!noReply) _pending.Add(exchange.Id, exchange);
        }
        new VfioUserHeader(exchange.Id, exchange.Command, (uint)sizeBytes, noReply ? VfioUserHeader.NoReply : 0, Errno.None).Write(message);
        return true;
    }

    /// <summary>True while the receiver moves a reply's body to another socket, which may take any time.</summary>
    internal bool IsMoving
    {
        get => _isMoving;
        set => _isMoving = value;
    }

    /// <summary>Sends a request whose last part comes from another socket; used by <see cref="VfioUserExchange"/>.</summary>
    internal Errno SendMoving(VfioUserExchange exchange, Span<byte> message, ReadOnlySpan<byte> data, SplicePipe pipe, OwnedFd from, int count, out Errno broken)
    {
        broken = Errno.None;
        if (!Enter(exchange, message, message.Length + data.Length + count, noReply: false)) return Errno.ENODEV;
        try
        {
            broken = _socket.SendMoving(message, data, pipe, from, count);
            return Errno.None;
        }
        catch (ChannelException e)
        {
            Fail(e);
            return Errno.ENODEV;
        }
    }

    /// <summary>Ends the connection because a request got no reply in time: a late reply would confuse later requests.</summary>
    internal void TimedOut(VfioUserExchange exchange, int timeoutMs) =>
        Fail(new ChannelException($"vfio-user '{Name}': no reply to {exchange.Command} in {timeoutMs} ms", Errno.ETIMEDOUT));

    /// <summary>Ends the connection for a reason; the first one stays.</summary>
    internal void Fail(VmmException reason)
    {
        VfioUserExchange[] orphans;
        bool tell;
        lock (_gate)
        {
            if (_fault is not null) return;
            Volatile.Write(ref _fault, reason);
            orphans = [.. _pending.Values];
            _pending.Clear();
            tell = !_disposed;
        }
        // Not when another process has the connection: a shutdown would end it there too.
        if (!IsElsewhere)
        {
            _socket.Shutdown();
            _twin?.Shutdown();
        }
        foreach (VfioUserExchange one in orphans) one.Complete(Errno.ENODEV, 0);
        // Raised on another thread: this one may hold the BQL, or be a receiver that a handler waits for.
        if (tell && Lost is { } lost) ThreadPool.QueueUserWorkItem(static state => state.lost(state.reason), (lost, reason), preferLocal: false);
    }

    /// <summary>Ends the connection and the threads. No request may be under way.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed) return;
            _disposed = true;
        }
        Fail(new ChannelException($"vfio-user '{Name}': the device was closed", Errno.ENODEV));
        // A callback of the timer may be running. It shuts sockets down, so it must end before they are closed.
        using (var idle = new ManualResetEvent(false))
        {
            if (_watchdog.Dispose(idle)) idle.WaitOne();
        }
        _turn.Set();
        foreach (Task receiver in _receivers) receiver.GetAwaiter().GetResult();
        _turn.Dispose();
        _twin?.Dispose();
        _socket.Dispose();
        _recording?.Dispose();
        _pause.Dispose();
    }

    private VfioUserVersion Negotiate()
    {
        using VfioUserExchange x = Begin();
        byte[] proposal = VfioUserVersion.ClientProposal.ToPayload();
        proposal.CopyTo(x.Body(proposal.Length));
        x.WantedFds = VfioUserLimits.MessageFds;
        Errno errno = x.Run(VfioUserCommand.Version);
        // A server closes the connection behind a refusal, so the refusal is looked at first.
        if (errno == Errno.EBUSY) throw Busy(Name);
        if (errno is not (Errno.None or Errno.ENODEV)) throw new VfioException($"vfio-user '{Name}': the server refuses our version: {Posix.Describe(errno)}", errno);
        if (Fault is { } fault) throw new VfioException($"vfio-user '{Name}': version negotiation failed", fault.Errno, fault);
        if (errno != Errno.None) throw new VfioException($"vfio-user '{Name}': the server refuses our version: {Posix.Describe(errno)}", errno);
        _version = x.Reply.ToArray();
        _recording = new VfioUserTranscript(_version);
        VfioUserVersion server;
        try
        {
            server = VfioUserVersion.Parse(x.Reply);
        }
        catch (VfioUserProtocolException e)
        {
            throw new VfioUserProtocolException($"vfio-user '{Name}': {e.Message}", e.Errno, e);
        }
        if (server.Major != 0 || server.Minor > VfioUserVersion.OurMinor)
            throw new VfioUserProtocolException($"vfio-user '{Name}': the server speaks version {server.Major}.{server.Minor}, at most 0.{VfioUserVersion.OurMinor} was proposed");
        if (server.TwinSocket is not { Supported: true } twin) return server;
        if (twin.FdIndex is not int index || index >= x.ReplyFds.Count || !Posix.IsSocket(x.ReplyFds[index]))
            throw new VfioUserProtocolException($"vfio-user '{Name}': twin_socket names descriptor {twin.FdIndex?.ToString() ?? "none"} of {x.ReplyFds.Count}, a socket is expected there");
        _twin = new VfioUserSocket(x.ReplyFds[index], Name);
        x.ReplyFds.RemoveAt(index);
        StartReceiver(_twin, "vfio-user/dma", isTwin: true);
        if (Fault is not null) _twin.Shutdown(); // It may have failed before it saw the twin.
        return server;
    }

    private void StartReceiver(VfioUserSocket socket, string threadName, bool isTwin = false, bool isWaiting = false) => _receivers.Add(WorkerThread.Run(threadName, () =>
    {
        bool paused = false;
        try
        {
            paused = (isWaiting && !WaitTurn()) || new VfioUserReceiver(this, socket, _dma).Run(isTwin ? _pause : null);
        }
        catch (VmmException e)
        {
            Fail(e);
        }
        finally
        {
            if (!paused) Fail(new ChannelException($"vfio-user '{Name}': nobody receives any more", Errno.ECONNABORTED));
        }
    }));

    /// <summary>Finds and removes the request that a reply belongs to. Receiver thread.</summary>
    internal VfioUserExchange TakePending(VfioUserHeader header)
    {
        lock (_gate)
        {
            if (_pending.TryGetValue(header.Id, out VfioUserExchange? exchange) && exchange.Command == header.Command && _pending.Remove(header.Id))
            {
                if (exchange == _last) (_last, _pausing) = (null, true);
                return exchange;
            }
        }
        throw new VfioUserProtocolException($"vfio-user '{Name}': a reply to {header.Command} with id {header.Id} that nobody waits for");
    }

    /// <summary>Sends a message, and tells the watchdog that a send is under way.</summary>
    /// <returns>False when the connection failed; the reason is stored.</returns>
    internal bool SendGuarded(VfioUserSocket socket, ReadOnlySpan<byte> message, ReadOnlySpan<SafeHandle> fds, ReadOnlySpan<byte> data = default)
    {
        Volatile.Write(ref _sendProgressMs, Environment.TickCount64);
        Interlocked.Increment(ref _senders);
        try
        {
            socket.Send(message, fds, data);
            return true;
        }
        catch (ChannelException e)
        {
            Fail(e);
            return false;
        }
        finally
        {
            Volatile.Write(ref _sendProgressMs, Environment.TickCount64);
            Interlocked.Decrement(ref _senders);
        }
    }

    /// <summary>Ends the connection when the server takes no bytes for too long. Called by a timer, because the senders themselves block in the kernel.</summary>
    private void CheckSenders()
    {
        if (Volatile.Read(ref _senders) == 0 || Environment.TickCount64 - Volatile.Read(ref _sendProgressMs) < TimeoutMs) return;
        Fail(new ChannelException($"vfio-user '{Name}': the server has taken no bytes for {TimeoutMs} ms", Errno.ETIMEDOUT));
    }
}
