using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// Serves one device behind the vfio-user protocol on a UNIX socket: one client at a time, while the next one waits. After a client is gone
/// the device runs on with its state (vfio-user 2 to 9). Several servers in one process share nothing (vfio-user S-51). Thread-safe.
/// </summary>
public sealed class VfioUserServer : IDisposable
{
    private readonly Lock _gate = new();
    private readonly VfioUserDevice _device;
    private readonly VfioUserServerOptions _options;
    private readonly OwnedFd _wake = Posix.EventFd();
    private UnixListener? _listener;
    private VfioUserSession? _session;
    private bool _stopping;

    /// <summary>Makes a server; the device is realized.</summary>
    /// <param name="backend">The device. The caller disposes it, after the server.</param>
    /// <param name="options">Limits and behaviour of the server.</param>
    /// <exception cref="ConfigurationException">The device describes itself wrongly.</exception>
    /// <exception cref="ArgumentOutOfRangeException">An option is over its limit.</exception>
    public VfioUserServer(IVfioUserBackend backend, VfioUserServerOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(backend);
        _options = options ?? new VfioUserServerOptions();
        ArgumentOutOfRangeException.ThrowIfGreaterThan(_options.MaxMsgFds, VfioUserSocket.MaxFds, nameof(options));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(_options.MaxDataXferBytes, 64 << 20, nameof(options));
        _device = new VfioUserDevice(backend, _options);
    }

    /// <summary>Counters since the start.</summary>
    public VfioUserServerStats Stats => _device.Stats;

    /// <summary>The device's migration state.</summary>
    public VfioDeviceState State => _device.Fsm.State;

    /// <summary>Completes when the server has ended, with the error that ended it; completed before <see cref="Listen"/>.</summary>
    public Task Completed { get; private set; } = Task.CompletedTask;

    internal VfioUserDevice Device => _device;

    /// <summary>Binds the socket, mode 0600, and serves from a thread of its own (vfio-user S-59). Makes missing folders, mode 0700.</summary>
    /// <param name="path">Path of the socket, at most 107 bytes. A socket that no process serves any more is replaced.</param>
    /// <exception cref="ConfigurationException">The path is too long, taken, or not a socket.</exception>
    /// <exception cref="ChannelException">The system refused the socket.</exception>
    public void Listen(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        _listener = UnixListener.Listen(path, backlog: 1);
        VfioUserLog.Listening(_options.Logger, path, _device.Backend.TypeName);
        Completed = WorkerThread.Run("vfu-server", AcceptLoop);
    }

    /// <summary>Serves one connected client on this thread until it is gone.</summary>
    /// <param name="connection">A stream socket; owned.</param>
    /// <param name="name">For logs and errors.</param>
    public void Serve(OwnedFd connection, string name)
    {
        using var session = new VfioUserSession(new VfioUserSocket(connection, name), _device);
        lock (_gate)
        {
            if (_session is not null) throw new InvalidOperationException("a client is being served");
            if (_stopping) return;
            _session = session;
        }
        try
        {
            session.Run();
        }
        finally
        {
            lock (_gate) _session = null;
        }
    }

    /// <summary>Accepts no new client, disconnects the present one and removes the socket. Does not wait: see <see cref="Completed"/>. Idempotent.</summary>
    public void Stop()
    {
        lock (_gate)
        {
            _stopping = true;
            _session?.Shutdown();
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

    private void AcceptLoop()
    {
        try
        {
            while (!_stopping && !(_options.Once && Stats.Sessions > 0))
            {
                if (Posix.Poll(_listener!.Socket, Posix.POLLIN, _wake, -1, out _) == 0) continue;
                OwnedFd? connection = Posix.Accept(_listener.Socket, out Errno errno);
                if (connection is null) throw Posix.Error($"vfio-user '{_listener.Path}': accept", errno);
                Serve(connection, _listener.Path);
            }
        }
        finally
        {
            _listener!.Dispose();
        }
    }
}
