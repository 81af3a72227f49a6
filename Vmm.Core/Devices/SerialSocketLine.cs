using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Core.Devices;

/// <summary>
/// A UNIX socket at the other end of a serial line, for one client at a time. Bytes that the guest sends without a client, or faster than the client
/// reads, are dropped, because a console must not stop a guest. Socket and client survive an update of the process. BQL: held for every call.
/// </summary>
internal sealed class SerialSocketLine : ISerialLine, IDisposable
{
    private const int ListenerFd = 0, ClientFd = 1;
    private const MigrationModes Modes = MigrationModes.CprTransfer | MigrationModes.CprExec;

    private readonly IDeviceServices _services;
    private readonly string _cprName;
    private readonly UnixListener _listener;
    private readonly List<IDisposable> _registrations = [];
    private IDisposable? _accepts, _clientEntry;
    private Serial16550? _port;
    private OwnedFd? _client;
    private SerialInput? _input;
    private bool _running, _disposed;
    // True while another process owns the path and the client's bytes: before this process takes over the VM, and after it gave the VM away.
    private bool _elsewhere;

    internal SerialSocketLine(string device, string path, IDeviceServices services)
    {
        (_services, _cprName) = (services, $"{device}_chardev");
        OwnedFd? inherited = services.CprFds.Take(_cprName, ListenerFd);
        _elsewhere = inherited is not null;
        _listener = inherited is null ? Listen(device, path) : UnixListener.Adopt(inherited, path);
        try
        {
            // Non-blocking, because two processes may wake for one connection and only one can accept it.
            Posix.SetNonBlocking(_listener.Socket, true);
            _registrations.Add(services.CprFds.Save(_cprName, ListenerFd, _listener.Socket));
            _registrations.Add(services.Notifiers.Add(OnMigration, Modes));
            services.CprFds.Arrived += OnArrived;
            if (!_elsewhere) Accept(true);
            else services.EventFds.Prepare();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public bool TryWrite(byte value)
    {
        if (_client is not null && Posix.Write(_client, [value], out Errno errno) < 0 && errno is not (Errno.EAGAIN or Errno.EINTR)) Drop();
        return true;
    }

    public void OnReceiveRoom() => _input?.Follow();

    public void Dispose()
    {
        _disposed = true;
        _services.CprFds.Arrived -= OnArrived;
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
        Accept(false);
        // Close without shutdown, because another process may serve the client now.
        Drop();
        _listener.RemovesFile = !_elsewhere;
        _listener.Dispose();
    }

    internal void Attach(Serial16550 port)
    {
        _port = port;
        if (_services.CprFds.Take(_cprName, ClientFd) is { } client) Serve(client);
    }

    internal void SetRunning(bool running)
    {
        _running = running;
        _input?.SetRunning(running && !_elsewhere);
    }

    private static UnixListener Listen(string device, string path)
    {
        try
        {
            return UnixListener.Listen(path, backlog: 1);
        }
        catch (VmmException e)
        {
            throw new ConfigurationException($"device '{device}': option 'socket': {e.Message}", e);
        }
    }

    /// <summary>
    /// Stops accepting and reading during an update: the kernel keeps new connections and unread bytes for the next process, which alone can take them.
    /// </summary>
    private void OnMigration(MigrationEvent what)
    {
        bool goesOn = what == MigrationEvent.PrecopyFailed;
        _elsewhere |= what == MigrationEvent.PrecopyDone;
        Accept(goesOn && !_elsewhere);
        _input?.SetRunning(goesOn && _running && !_elsewhere);
    }

    private void OnArrived()
    {
        _elsewhere = false;
        Accept(true);
    }

    private void Accept(bool on)
    {
        if (on) _accepts ??= _services.EventFds.Add(_listener.Socket, OnConnection);
        else
        {
            _accepts?.Dispose();
            _accepts = null;
        }
    }

    private void OnConnection()
    {
        using (_services.Bql.Acquire())
        {
            if (_disposed || _accepts is null || Posix.Accept(_listener.Socket, out _) is not { } client) return;
            if (_client is not null || _port is null)
            {
                client.Dispose();
                return;
            }
            Posix.SetNonBlocking(client, true);
            Serve(client);
        }
    }

    private void Serve(OwnedFd client)
    {
        _client = client;
        _clientEntry = _services.CprFds.Save(_cprName, ClientFd, client);
        _input = new SerialInput(_services, _port!, client, Drop);
        _input.SetRunning(_running && !_elsewhere);
    }

    private void Drop()
    {
        _clientEntry?.Dispose();
        _input?.Dispose();
        _client?.Dispose();
        (_clientEntry, _input, _client) = (null, null, null);
    }
}
