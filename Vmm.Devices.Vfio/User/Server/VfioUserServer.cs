using System.Text;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// Serves one device behind the vfio-user protocol on a UNIX socket: one client at a time, the next one waits; a client that goes leaves the
/// device running with its state (vfio-user 2 to 9). Several servers in one process share nothing (vfio-user S-51). Thread-safe.
/// </summary>
public sealed class VfioUserServer : IDisposable
{
    private const uint OwnerOnly = 0x180; // rw-------

    private readonly Lock _gate = new();
    private readonly VfioUserDevice _device;
    private readonly VfioUserServerOptions _options;
    private readonly OwnedFd _wake = Posix.EventFd();
    private OwnedFd? _listener;
    private string? _path;
    private VfioUserSession? _session;
    private bool _stopping;

    /// <summary>Makes a server; the device is realized.</summary>
    /// <param name="backend">The device; stays the caller's, who disposes it after the server.</param>
    /// <param name="options">How to serve.</param>
    /// <exception cref="ConfigurationException">The device describes itself wrongly.</exception>
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

    /// <summary>Completes when the server has ended, with the error that ended it; before <see cref="Listen"/> it is complete.</summary>
    public Task Completed { get; private set; } = Task.CompletedTask;

    internal VfioUserDevice Device => _device;

    /// <summary>Binds the socket, mode 0600, and serves from a thread of its own (vfio-user S-59).</summary>
    /// <param name="path">At most 107 bytes. A socket that nobody serves any more is replaced.</param>
    /// <exception cref="ConfigurationException">The path is too long, taken, or not a socket.</exception>
    /// <exception cref="ChannelException">The system refused it.</exception>
    public void Listen(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        byte[] address = Posix.UnixAddress(path);
        RemoveStale(path, address);
        _listener = Listener(path, address);
        _path = path;
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

    /// <summary>Ends: no new client, the present one is disconnected, the socket is removed. <see cref="Completed"/> says when. Idempotent.</summary>
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
        // What ended it was told by the task; here only the end counts.
        Task.WaitAny(Completed);
        _device.Dispose();
        _wake.Dispose();
    }

    /// <summary>
    /// A socket whose file has its name only when it takes connections: clients wait for the file and connect at once, libvfio-user's sample among them.
    /// </summary>
    private static OwnedFd Listener(string path, byte[] address)
    {
        string early = Path.Combine(Path.GetDirectoryName(path) ?? "", "." + Path.GetRandomFileName());
        bool fits = Encoding.UTF8.GetByteCount(early) <= Posix.MaxUnixPathBytes;
        if (!fits) early = path;
        OwnedFd listener = Posix.Socket(Posix.AF_UNIX);
        Errno errno = Posix.Bind(listener, fits ? Posix.UnixAddress(early) : address);
        if (errno == Errno.None)
        {
            // Before listen nobody can connect, so there is no moment in which others could.
            errno = Posix.Chmod(early, OwnerOnly);
            if (errno == Errno.None) errno = Posix.Listen(listener, 1);
            if (errno == Errno.None && fits) errno = Posix.Link(early, path);
            if (errno != Errno.None || fits) File.Delete(early);
        }
        if (errno == Errno.None) return listener;
        listener.Dispose();
        throw Posix.Error($"vfio-user '{path}': listen", errno);
    }

    private static void RemoveStale(string path, byte[] address)
    {
        if (!Path.Exists(path)) return;
        using OwnedFd probe = Posix.Socket(Posix.AF_UNIX);
        Errno errno = Posix.Connect(probe, address, null, 1000);
        if (errno != Errno.ECONNREFUSED)
        {
            throw new ConfigurationException($"socket '{path}' " + (errno == Errno.None ? "is served by another process" : $"cannot be replaced: {Posix.Describe(errno)}"));
        }
        // Connecting to a plain file is refused too.
        using (OwnedFd? file = Posix.Open(path, Posix.O_RDONLY, 0, out errno))
        {
            if (file is not null) throw new ConfigurationException($"'{path}' is not a socket");
        }
        File.Delete(path);
    }

    private void AcceptLoop()
    {
        try
        {
            while (!_stopping && !(_options.Once && Stats.Sessions > 0))
            {
                if (Posix.Poll(_listener!, Posix.POLLIN, _wake, -1, out _) == 0) continue;
                OwnedFd? connection = Posix.Accept(_listener!, out Errno errno);
                if (connection is null) throw Posix.Error($"vfio-user '{_path}': accept", errno);
                Serve(connection, _path!);
            }
        }
        finally
        {
            File.Delete(_path!);
            _listener!.Dispose();
        }
    }
}
