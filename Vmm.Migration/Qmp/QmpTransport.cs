using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>A blocking byte transport under one QMP connection. One thread reads, one writes; <see cref="Shutdown"/> ends both from any thread.</summary>
internal interface IQmpTransport : IDisposable
{
    /// <summary>Reads some bytes; descriptors that came with them are added. 0 at the end, also after <see cref="Shutdown"/> or a reset.</summary>
    int Read(Span<byte> into, List<OwnedFd> received);

    /// <summary>Writes all bytes, with a descriptor if given; false once the peer is gone.</summary>
    bool Write(ReadOnlySpan<byte> bytes, OwnedFd? fd = null);

    /// <summary>Wakes blocked calls; further ones end at once.</summary>
    void Shutdown();
}

/// <summary>QMP over a connected UNIX socket; owns it.</summary>
internal sealed class SocketQmpTransport(OwnedFd socket) : IQmpTransport
{
    private readonly Lock _gate = new();

    /// <inheritdoc/>
    public int Read(Span<byte> into, List<OwnedFd> received) => Math.Max(0, Posix.ReceiveWithFds(socket, into, received, wait: true, out _));

    /// <inheritdoc/>
    public bool Write(ReadOnlySpan<byte> bytes, OwnedFd? fd = null)
    {
        while (bytes.Length > 0)
        {
            int n = Posix.SendWithFds(socket, bytes, fd is null ? [] : [fd], out _);
            if (n < 0) return false;
            bytes = bytes[n..];
            fd = null;
        }
        return true;
    }

    /// <inheritdoc/>
    public void Shutdown()
    {
        // An event may find its client gone: the last user may have closed the socket already.
        lock (_gate)
            if (!socket.IsClosed) Posix.ShutdownSocket(socket, Posix.SHUT_RDWR);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_gate) socket.Dispose();
    }
}

/// <summary>QMP over a pair of streams, e.g. standard input and output; owns both and passes no descriptors.</summary>
internal sealed class StreamQmpTransport(System.IO.Stream input, System.IO.Stream output) : IQmpTransport
{
    private volatile bool _closed;

    /// <inheritdoc/>
    public int Read(Span<byte> into, List<OwnedFd> received)
    {
        try
        {
            return _closed ? 0 : input.Read(into);
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            // The end of the connection, as 0 says; which side ended it is known to the caller.
            return 0;
        }
    }

    /// <inheritdoc/>
    public bool Write(ReadOnlySpan<byte> bytes, OwnedFd? fd = null)
    {
        if (fd is not null) throw new ConfigurationException("this QMP connection cannot carry descriptors");
        try
        {
            if (_closed) return false;
            output.Write(bytes);
            output.Flush();
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
}
