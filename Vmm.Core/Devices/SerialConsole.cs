using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Devices;

/// <summary>
/// Hands what arrives at a descriptor to a serial port: as much as the port has room for, and only while the guest runs, so that nothing is lost in
/// a migration. BQL: held for every call.
/// </summary>
/// <param name="services">The VM's services.</param>
/// <param name="port">The port.</param>
/// <param name="fd">A terminal, pipe or socket; the caller's.</param>
/// <param name="ended">Called when there will be no more, or null.</param>
internal sealed class SerialInput(IDeviceServices services, Serial16550 port, OwnedFd fd, Action? ended = null) : IDisposable
{
    private const int MaxBytes = 16;
    private IDisposable? _watch;
    private bool _running, _ended;

    public void Dispose()
    {
        _ended = true;
        Follow();
    }

    internal void SetRunning(bool running)
    {
        _running = running;
        Follow();
    }

    /// <summary>Watches the descriptor exactly while the port has room: it stays readable for as long as nobody reads.</summary>
    internal void Follow()
    {
        bool wants = !_ended && _running && port.ReceiveRoom > 0;
        if (wants) _watch ??= services.EventFds.Add(fd, OnReadable);
        else
        {
            _watch?.Dispose();
            _watch = null;
        }
    }

    private void OnReadable()
    {
        using (services.Bql.Acquire())
        {
            if (_watch is null) return;
            Span<byte> bytes = stackalloc byte[MaxBytes];
            int count = Posix.Read(fd, bytes[..Math.Min(port.ReceiveRoom, MaxBytes)], out Errno errno);
            if (count > 0) port.Receive(bytes[..count]);
            bool isEnd = count == 0 || (count < 0 && errno is not (Errno.EAGAIN or Errno.EINTR));
            _ended |= isEnd;
            Follow();
            if (isEnd) ended?.Invoke();
        }
    }
}

/// <summary>
/// A Unix socket at the far end of a serial line, for one client at a time. What the guest sends while none is there, or faster than the client
/// reads, is dropped: a console must not hold up a guest. BQL: held for every call.
/// </summary>
internal sealed class SerialSocketLine : ISerialLine, IDisposable
{
    private const int UnixFamily = 1;

    private readonly IDeviceServices _services;
    private readonly string _path;
    private readonly OwnedFd _listener;
    private readonly IDisposable _accepts;
    private Serial16550? _port;
    private OwnedFd? _client;
    private SerialInput? _input;
    private bool _running, _disposed;

    internal SerialSocketLine(string device, string path, IDeviceServices services)
    {
        (_services, _path) = (services, path);
        _listener = Posix.Socket(UnixFamily);
        try
        {
            byte[] address = Posix.UnixAddress(path);
            Errno errno = Posix.Bind(_listener, address);
            if (errno == Errno.EADDRINUSE && IsLeftBehind(address))
            {
                File.Delete(path);
                errno = Posix.Bind(_listener, address);
            }
            if (errno == Errno.None) errno = Posix.Listen(_listener, 1);
            if (errno != Errno.None) throw new ConfigurationException($"device '{device}': option 'socket': cannot listen at '{path}': {Posix.Describe(errno)}");
            _accepts = services.EventFds.Add(_listener, OnConnection);
        }
        catch
        {
            _listener.Dispose();
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
        _accepts.Dispose();
        Drop();
        _listener.Dispose();
        File.Delete(_path);
    }

    internal void Attach(Serial16550 port) => _port = port;

    internal void SetRunning(bool running)
    {
        _running = running;
        _input?.SetRunning(running);
    }

    private void OnConnection()
    {
        using (_services.Bql.Acquire())
        {
            if (_disposed || Posix.Accept(_listener, out _) is not { } client) return;
            if (_client is not null || _port is null)
            {
                client.Dispose();
                return;
            }
            Posix.SetNonBlocking(client, true);
            _client = client;
            _input = new SerialInput(_services, _port, client, Drop);
            _input.SetRunning(_running);
        }
    }

    /// <summary>A socket that nobody listens at.</summary>
    private static bool IsLeftBehind(byte[] address)
    {
        using OwnedFd probe = Posix.Socket(UnixFamily);
        return Posix.Connect(probe, address, null, 1000) == Errno.ECONNREFUSED;
    }

    private void Drop()
    {
        _input?.Dispose();
        _client?.Dispose();
        (_input, _client) = (null, null);
    }
}
