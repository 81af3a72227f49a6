using System.Net.Sockets;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>The bytes of one QMP connection. Allows one read and one write at a time; any thread may call <see cref="Shutdown"/>, which ends both.</summary>
internal interface IQmpTransport : IDisposable
{
    /// <summary>Reads some bytes and adds the descriptors that came with them. Returns 0 at the end, also after <see cref="Shutdown"/> or a reset.</summary>
    ValueTask<int> ReadAsync(Memory<byte> into, List<OwnedFd> received);

    /// <summary>Writes all bytes, and the descriptor if one is given; returns false once the peer is gone.</summary>
    ValueTask<bool> WriteAsync(ReadOnlyMemory<byte> bytes, OwnedFd? fd = null);

    /// <summary>After the end was read: true if the peer has closed its reading side too.</summary>
    bool HasPeerLeft { get; }

    /// <summary>Ends the calls that wait; later calls return at once.</summary>
    void Shutdown();
}

/// <summary>
/// QMP over a connected UNIX socket, which it owns. A .NET socket on a duplicate of the descriptor waits and writes; recvmsg and sendmsg pass
/// descriptors, which .NET sockets cannot.
/// </summary>
internal sealed class SocketQmpTransport : IQmpTransport
{
    private readonly Lock _gate = new();
    private readonly OwnedFd _fd;
    private readonly Socket _socket;

    /// <exception cref="ChannelException">The descriptor is no socket, or this process has too many open files.</exception>
    internal SocketQmpTransport(OwnedFd fd)
    {
        _fd = fd;
        try
        {
            using OwnedFd duplicate = Posix.Duplicate(fd);
            _socket = new Socket(new SafeSocketHandle(duplicate.Number, ownsHandle: true));
            duplicate.SetHandleAsInvalid();
        }
        catch (Exception e) when (e is SocketException or ChannelException)
        {
            fd.Dispose();
            throw new ChannelException($"QMP connection: {e.Message}", e is ChannelException c ? c.Errno : Errno.EINVAL, e);
        }
    }

    /// <inheritdoc/>
    public async ValueTask<int> ReadAsync(Memory<byte> into, List<OwnedFd> received)
    {
        try
        {
            while (true)
            {
                int n = Posix.ReceiveWithFds(_fd, into.Span, received, wait: false, out Errno errno);
                if (n >= 0 || errno != Errno.EAGAIN) return Math.Max(0, n);
                // A receive into an empty buffer completes when the socket becomes readable.
                await _socket.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None).ConfigureAwait(false);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // Either exception means that the connection has ended, which 0 reports; the caller knows which side ended it.
            return 0;
        }
    }

    /// <inheritdoc/>
    public async ValueTask<bool> WriteAsync(ReadOnlyMemory<byte> bytes, OwnedFd? fd = null)
    {
        try
        {
            if (fd is not null)
            {
                int sent = SendWith(bytes.Span, fd);
                if (sent < 0) return false;
                bytes = bytes[sent..];
            }
            while (bytes.Length > 0) bytes = bytes[await _socket.SendAsync(bytes, SocketFlags.None).ConfigureAwait(false)..];
            return true;
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            return false;
        }
    }

    /// <inheritdoc/>
    public bool HasPeerLeft
    {
        get { lock (_gate) return _fd.IsClosed || (Posix.Poll(_fd, 0, null, 0, out _) & (Posix.POLLHUP | Posix.POLLERR)) != 0; }
    }

    /// <inheritdoc/>
    public void Shutdown()
    {
        // A thread that posts an event may call this after the session has closed the socket.
        lock (_gate)
            if (!_fd.IsClosed) Posix.ShutdownSocket(_fd, Posix.SHUT_RDWR);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_gate)
        {
            _socket.Dispose();
            _fd.Dispose();
        }
    }

    /// <summary>Sends the first bytes with a descriptor. Waits until the socket has room; <see cref="Shutdown"/> ends the wait.</summary>
    private int SendWith(ReadOnlySpan<byte> bytes, OwnedFd fd)
    {
        while (true)
        {
            int sent = Posix.SendWithFds(_fd, bytes, [fd], out Errno errno);
            if (errno != Errno.EAGAIN) return sent;
            Posix.Poll(_fd, Posix.POLLOUT, null, -1, out _);
        }
    }
}

/// <summary>QMP over a pair of streams, e.g. standard input and output. It owns both and cannot pass descriptors.</summary>
internal sealed class StreamQmpTransport(System.IO.Stream input, System.IO.Stream output) : IQmpTransport
{
    private volatile bool _closed;

    /// <inheritdoc/>
    // Standard input has no asynchronous read, so each read blocks a dedicated thread instead of a pool thread.
    public ValueTask<int> ReadAsync(Memory<byte> into, List<OwnedFd> received) =>
        new(Task.Factory.StartNew(() => Read(into.Span), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default));

    /// <inheritdoc/>
    public async ValueTask<bool> WriteAsync(ReadOnlyMemory<byte> bytes, OwnedFd? fd = null)
    {
        if (fd is not null) throw new ConfigurationException("this QMP connection cannot carry descriptors");
        try
        {
            if (_closed) return false;
            await output.WriteAsync(bytes).ConfigureAwait(false);
            await output.FlushAsync().ConfigureAwait(false);
            return true;
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            return false;
        }
    }

    /// <inheritdoc/>
    // Standard output says nothing about its reader before a write fails.
    public bool HasPeerLeft => _closed;

    /// <inheritdoc/>
    public void Shutdown()
    {
        _closed = true;
        input.Dispose();
        output.Dispose();
    }

    /// <inheritdoc/>
    public void Dispose() => Shutdown();

    private int Read(Span<byte> into)
    {
        try
        {
            return _closed ? 0 : input.Read(into);
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            return 0;
        }
    }
}
