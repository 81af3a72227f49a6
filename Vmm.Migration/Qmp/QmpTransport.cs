using System.Net.Sockets;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>The bytes of one QMP connection. One read and one write at a time; <see cref="Shutdown"/> ends both, from any thread.</summary>
internal interface IQmpTransport : IDisposable
{
    /// <summary>Reads some bytes; descriptors that came with them are added. 0 at the end, also after <see cref="Shutdown"/> or a reset.</summary>
    ValueTask<int> ReadAsync(Memory<byte> into, List<OwnedFd> received);

    /// <summary>Writes all bytes, with a descriptor if given; false once the peer is gone.</summary>
    ValueTask<bool> WriteAsync(ReadOnlyMemory<byte> bytes, OwnedFd? fd = null);

    /// <summary>Ends calls that wait; further ones end at once.</summary>
    void Shutdown();
}

/// <summary>
/// QMP over a connected UNIX socket; owns it. The runtime's socket, on a duplicate of the descriptor, waits and writes; only recvmsg and sendmsg
/// carry descriptors.
/// </summary>
internal sealed class SocketQmpTransport : IQmpTransport
{
    private readonly Lock _gate = new();
    private readonly OwnedFd _fd;
    private readonly Socket _socket;

    /// <exception cref="ChannelException">It is not a socket, or this process has too many open files.</exception>
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
                // A read of nothing waits until there is something to read.
                await _socket.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None).ConfigureAwait(false);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // The end of the connection, as 0 says; which side ended it is known to the caller.
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
    public void Shutdown()
    {
        // An event may find its client gone: the last user may have closed the socket already.
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

    /// <summary>Sends the first bytes with a descriptor; waits for room, which <see cref="Shutdown"/> ends.</summary>
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

/// <summary>QMP over a pair of streams, e.g. standard input and output; owns both and passes no descriptors.</summary>
internal sealed class StreamQmpTransport(System.IO.Stream input, System.IO.Stream output) : IQmpTransport
{
    private volatile bool _closed;

    /// <inheritdoc/>
    // Standard input cannot be waited for, so each read blocks a thread of its own, and none of the pool.
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
