using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// Serves one device behind the vfio-user protocol on a UNIX socket, one client at a time. The first client whose VERSION is there gets the device; until
/// it leaves, every other one is refused with EBUSY. A connection without a VERSION keeps nobody from the device and ends after a deadline. After a
/// client is gone the device runs on with its state (vfio-user 2 to 9). Several servers in one process share nothing (vfio-user S-51). Thread-safe.
/// </summary>
public sealed class VfioUserServer : IDisposable
{
    private const int RetryAcceptMs = 1000;

    // Lack of descriptors or memory, which may pass: EMFILE, ENFILE, ENOBUFS, ENOMEM. A client waits in the backlog meanwhile.
    private static readonly Errno[] s_noRoom = [Errno.EMFILE, (Errno)23, (Errno)105, Errno.ENOMEM];

    private readonly object _gate = new();
    private readonly VfioUserDevice _device;
    private readonly VfioUserServerOptions _options;
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly List<VfioUserSession> _sessions = []; // All connections, oldest first. Guarded by _gate.
    private UnixListener? _listener;
    private VfioUserSession? _owner; // The one that has the device. Guarded by _gate.
    private volatile bool _stopping;

    /// <summary>Makes a server; the device is realized.</summary>
    /// <param name="backend">The device. The caller disposes it, after the server.</param>
    /// <param name="options">Limits and behaviour of the server.</param>
    /// <exception cref="ConfigurationException">The device describes itself wrongly.</exception>
    /// <exception cref="ArgumentOutOfRangeException">An option is over its limit.</exception>
    public VfioUserServer(IVfioUserBackend backend, VfioUserServerOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(backend);
        _options = options ?? new VfioUserServerOptions();
        ArgumentOutOfRangeException.ThrowIfGreaterThan(_options.MaxMsgFds, VfioUserLimits.MessageFds, nameof(options));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(_options.MaxDataXferBytes, VfioUserLimits.MaxDataXferBytes, nameof(options));
        _device = new VfioUserDevice(backend, _options);
    }

    /// <summary>Counters since the start.</summary>
    public VfioUserServerStats Stats => _device.Stats;

    /// <summary>The device's migration state.</summary>
    public VfioDeviceState State => _device.Fsm.State;

    /// <summary>Completes when the server has ended, with the error that ended it; completed before <see cref="Listen"/>.</summary>
    public Task Completed { get; private set; } = Task.CompletedTask;

    internal VfioUserDevice Device => _device;

    /// <summary>Binds the socket, mode 0600, and serves from threads of its own (vfio-user S-59). Makes missing folders, mode 0700.</summary>
    /// <param name="path">Path of the socket, at most 107 bytes. A socket that no process serves any more is replaced.</param>
    /// <exception cref="ConfigurationException">The path is too long, taken, or not a socket.</exception>
    /// <exception cref="ChannelException">The system refused the socket.</exception>
    public void Listen(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        _listener = UnixListener.Listen(path, backlog: VfioUserLimits.Backlog);
        VfioUserLog.Listening(_options.Logger, path, _device.Backend.TypeName);
        Completed = WorkerThread.Run("vfu-server", AcceptLoop);
    }

    /// <summary>Serves one connected client on this thread until it is gone. A client that comes while another one has the device is refused.</summary>
    /// <param name="connection">A stream socket; owned.</param>
    /// <param name="name">For logs and errors.</param>
    public void Serve(OwnedFd connection, string name)
    {
        var session = new VfioUserSession(new VfioUserSocket(connection, name), _device);
        Enter(session);
        Run(session);
    }

    /// <summary>Accepts no new client, disconnects the present one and removes the socket. Does not wait: see <see cref="Completed"/>. Idempotent.</summary>
    public void Stop()
    {
        lock (_gate)
        {
            _stopping = true;
            foreach (VfioUserSession session in _sessions) session.Shutdown();
            Monitor.PulseAll(_gate);
        }
        Posix.SignalEventFd(_wake);
    }

    /// <summary>Stops and waits for the end.</summary>
    public void Dispose()
    {
        Stop();
        // Only the end counts here; Completed reports the error.
        Task.WaitAny(Completed);
        _device.Dispose();
        _wake.Dispose();
    }

    private void Enter(VfioUserSession session)
    {
        lock (_gate)
        {
            if (_sessions.Count(s => !ReferenceEquals(s, _owner)) >= VfioUserLimits.Greetings) DropOldestGreeting();
            _sessions.Add(session);
            if (_stopping) session.Shutdown();
        }
    }

    /// <summary>Runs a session to its end and disposes it.</summary>
    private void Run(VfioUserSession session)
    {
        bool hadDevice = false;
        try
        {
            hadDevice = session.Run(() => TryTakeDevice(session));
        }
        finally
        {
            lock (_gate)
            {
                _sessions.Remove(session);
                if (ReferenceEquals(_owner, session)) _owner = null;
                Monitor.PulseAll(_gate);
            }
            session.Dispose();
        }
        if (hadDevice && _options.Once && Stats.Sessions > 0) Stop();
    }

    /// <summary>Gives the device to a session. Waits while the last client's session ends, but not for a client that is there.</summary>
    private bool TryTakeDevice(VfioUserSession session)
    {
        long until = Environment.TickCount64 + (long)VfioUserDeadlines.Succession.TotalMilliseconds;
        lock (_gate)
        {
            while (!_stopping && _owner is { } owner)
            {
                long left = until - Environment.TickCount64;
                if (left <= 0 || !owner.IsLeaving) return false;
                Monitor.Wait(_gate, (int)left);
            }
            if (_stopping) return false;
            _owner = session;
            return true;
        }
    }

    private void AcceptLoop()
    {
        var clients = new List<Task>();
        try
        {
            while (!_stopping)
            {
                if (Posix.Poll(_listener!.Socket, Posix.POLLIN, _wake, -1, out _) == 0) continue;
                clients.RemoveAll(static c => c.IsCompletedSuccessfully);
                if (Accept() is { } client) clients.Add(client);
            }
        }
        finally
        {
            // First, so that a successor can listen at the path while the last client's session still ends.
            _listener!.Dispose();
            Stop();
            Task.WhenAll(clients).GetAwaiter().GetResult();
        }
    }

    /// <summary>Accepts one connection and serves it on a thread of its own. Null when this process has no room for it now.</summary>
    private Task? Accept()
    {
        string path = _listener!.Path;
        VfioUserSession session;
        OwnedFd? connection = Posix.Accept(_listener.Socket, out Errno errno);
        try
        {
            if (connection is null) throw Posix.Error("accept", errno);
            session = new VfioUserSession(new VfioUserSocket(connection, path), _device);
        }
        catch (ChannelException e)
        {
            connection?.Dispose();
            if (!s_noRoom.Contains(e.Errno)) throw;
            VfioUserLog.AcceptFailed(_options.Logger, path, VmmException.Describe(e));
            lock (_gate) DropOldestGreeting();
            Posix.Poll(_wake, Posix.POLLIN, null, RetryAcceptMs, out _);
            return null;
        }
        Enter(session);
        Task client = WorkerThread.Run("vfu-client", () => Run(session));
        // A device that throws ends the server, so that the user notices the failure.
        client.ContinueWith(_ => Stop(), CancellationToken.None, TaskContinuationOptions.OnlyOnFaulted, TaskScheduler.Default);
        return client;
    }

    /// <summary>Ends the connection that has been here longest without the device, which makes room for one that may be a client. Gate: held.</summary>
    private void DropOldestGreeting() => _sessions.Find(s => !s.IsShut && !ReferenceEquals(s, _owner))?.Shutdown();
}
