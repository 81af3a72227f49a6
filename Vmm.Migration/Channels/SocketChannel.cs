using System.Diagnostics;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Channels;

/// <summary>How the peer of a socket ended the connection.</summary>
internal enum PeerEnd
{
    /// <summary>The connection is still open.</summary>
    Open,
    /// <summary>The peer read everything and closed.</summary>
    Closed,
    /// <summary>The peer died, or closed with unread bytes.</summary>
    Reset,
}

/// <summary>A connected stream socket in blocking mode; shutdown(2) wakes blocked calls. TCP and UNIX.</summary>
internal sealed class SocketChannel : IMigrationChannel
{
    /// <summary>A read of this size shows that bulk data flows, so that the next bytes come very soon.</summary>
    private const int FlowBytes = 4 << 10;

    private static readonly long s_spinTicks = Environment.ProcessorCount > 1 ? Stopwatch.Frequency / 5_000 : 0;

    private const int UnixSendBufferBytes = 2 << 20;

    private readonly OwnedFd _fd;
    private volatile bool _shut;
    private volatile bool _isReading, _isWriting;
    private long _sent, _received;
    private bool _flowing;

    internal SocketChannel(OwnedFd fd, string name, bool tcp)
    {
        _fd = fd;
        Name = name;
        Posix.SetNonBlocking(fd, false);
        if (tcp) Posix.TuneTcp(fd);
        // TCP adapts its buffers, but a UNIX socket keeps its small default buffer.
        if (!tcp) Posix.WidenSendBuffer(fd, UnixSendBufferBytes);
    }

    public string Name { get; }

    public bool IsBidirectional => true;

    public OwnedFd? Descriptor => _fd;

    public bool PeerHasClosed => Posix.HasPeerClosed(_fd, out _);

    /// <summary>Bytes that came from the peer. Any thread.</summary>
    internal long ReceivedBytes => Volatile.Read(ref _received);

    /// <summary>True while a thread waits for bytes. Any thread.</summary>
    internal bool IsReading => _isReading;

    /// <summary>
    /// Bytes that the peer's host has taken (TCP) or the peer has read (UNIX), and whether more wait to be taken. Any thread.
    /// </summary>
    internal (long TakenBytes, bool IsWaiting) Taken
    {
        get
        {
            long sent = Volatile.Read(ref _sent);
            int left = _fd.IsClosed ? 0 : Math.Max(Posix.UnacknowledgedBytes(_fd), 0);
            return (sent - left, left > 0 || _isWriting);
        }
    }

    public int Read(Span<byte> destination)
    {
        int n = -1;
        Errno errno = Errno.EAGAIN;
        _isReading = true;
        if (_flowing) n = ReceiveSpinning(destination, out errno);
        if (n < 0 && errno == Errno.EAGAIN) n = Posix.Receive(_fd, destination, 0, out errno);
        _isReading = false;
        _flowing = n >= FlowBytes;
        if (n > 0) Volatile.Write(ref _received, _received + n);
        return n >= 0 && !(_shut && n == 0) ? n : throw Failed("read from", errno);
    }

    int IMigrationChannel.ReadScatter(GatherList parts)
    {
        _isReading = true;
        long n = parts.ReceiveOnce(_fd, 0, out Errno errno);
        _isReading = false;
        if (n > 0) Volatile.Write(ref _received, _received + n);
        return n >= 0 && !(_shut && n == 0) ? (int)n : throw Failed("read from", errno);
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        _isWriting = true;
        try
        {
            while (source.Length > 0)
            {
                int n = Posix.SendWithFds(_fd, source, [], out Errno errno);
                if (n < 0) throw Failed("write to", errno);
                Volatile.Write(ref _sent, _sent + n);
                source = source[n..];
            }
        }
        finally
        {
            _isWriting = false;
        }
    }

    /// <summary>Sends a few bytes if the socket takes all of them at once; never blocks. Any thread, as long as no other one writes.</summary>
    internal bool TrySend(ReadOnlySpan<byte> bytes) => !_shut && !_fd.IsClosed && Posix.SendNow(_fd, bytes) == bytes.Length;

    public void WriteGather(GatherList parts)
    {
        _isWriting = true;
        try
        {
            while (parts.PendingBytes > 0)
            {
                long n = parts.SendOnce(_fd, out Errno errno);
                if (n < 0) throw Failed("write to", errno);
                Volatile.Write(ref _sent, _sent + n);
            }
        }
        finally
        {
            _isWriting = false;
            parts.Clear();
        }
    }

    public void Shutdown(ChannelShutdown how)
    {
        if (how == ChannelShutdown.Both) _shut = true;
        if (_fd.IsClosed) return;
        try
        {
            Posix.ShutdownSocket(_fd, how switch { ChannelShutdown.Read => Posix.SHUT_RD, ChannelShutdown.Write => Posix.SHUT_WR, _ => Posix.SHUT_RDWR });
        }
        catch (ObjectDisposedException)
        {
            // The owner closed the socket between the check and the call, which ended the connection too.
        }
    }

    public bool Drain(TimeSpan timeout)
    {
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            int left = Posix.UnacknowledgedBytes(_fd);
            if (left == 0) return !_shut && Posix.SocketError(_fd) == Errno.None;
            if (left < 0 || _shut) return false;
            TimeSpan spent = Stopwatch.GetElapsedTime(start);
            if (spent > timeout) return false;
            // A local link acknowledges within microseconds, so spin first. Later poll for 1 ms at a time, which an error ends.
            if (spent < TimeSpan.FromMicroseconds(200)) Thread.SpinWait(200);
            else if ((Posix.Poll(_fd, 0, null, 1, out _) & (Posix.POLLERR | Posix.POLLHUP)) != 0)
            {
                // A peer that closed after it read everything is no error; one that closed with unread bytes leaves an error on the socket.
                return Posix.SocketError(_fd) == Errno.None && Posix.UnacknowledgedBytes(_fd) == 0;
            }
        }
    }

    /// <summary>Waits for the first byte or the end of the connection.</summary>
    internal bool WaitReadable(int timeoutMs) => Posix.Poll(_fd, Posix.POLLIN, null, timeoutMs, out _) != 0;

    /// <summary>True if an unread byte has arrived.</summary>
    internal bool HasUnread()
    {
        Span<byte> one = stackalloc byte[1];
        return Posix.Receive(_fd, one, Posix.MSG_PEEK | Posix.MSG_DONTWAIT, out _) > 0;
    }

    /// <summary>Copies the unread bytes that are here, as many as fit, without consuming them and without waiting.</summary>
    /// <param name="bytes">Receives them.</param>
    /// <param name="end">Whether the peer has ended its direction; bytes may be unread all the same.</param>
    /// <returns>How many are here.</returns>
    internal int Peek(Span<byte> bytes, out PeerEnd end)
    {
        // Before the bytes: after the end no more come, so the count is then the final one.
        short events = Posix.Poll(_fd, Posix.POLLRDHUP, null, 0, out _);
        end = (events & Posix.POLLERR) != 0 ? PeerEnd.Reset : events != 0 ? PeerEnd.Closed : PeerEnd.Open;
        int n = Posix.Receive(_fd, bytes, Posix.MSG_PEEK | Posix.MSG_DONTWAIT, out Errno errno);
        if (n == 0 && end == PeerEnd.Open) end = PeerEnd.Closed;
        else if (n < 0 && errno != Errno.EAGAIN) end = PeerEnd.Reset;
        return Math.Max(n, 0);
    }

    /// <summary>Ends the connection after the last byte: shuts this direction down and waits for the peer to end its own.</summary>
    internal PeerEnd WaitPeerEnd(TimeSpan timeout)
    {
        Shutdown(ChannelShutdown.Write);
        Span<byte> waste = stackalloc byte[256];
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            int left = (int)(timeout - Stopwatch.GetElapsedTime(start)).TotalMilliseconds;
            if (left <= 0 || Posix.Poll(_fd, Posix.POLLIN, null, left, out _) == 0) return PeerEnd.Open;
            int n = Posix.Receive(_fd, waste, Posix.MSG_DONTWAIT, out Errno errno);
            if (n == 0) return PeerEnd.Closed;
            if (n < 0 && errno != Errno.EAGAIN) return PeerEnd.Reset;
        }
    }

    public void Dispose() => _fd.Dispose();

    /// <summary>
    /// Receives without blocking for at most 200 us before the thread sleeps. Otherwise a receiver faster than its sender sleeps after every segment, and
    /// the sender spends its time on waking it, which costs a fifth of one channel's throughput (tools/bench migrate one).
    /// </summary>
    private int ReceiveSpinning(Span<byte> destination, out Errno errno)
    {
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            int n = Posix.Receive(_fd, destination, Posix.MSG_DONTWAIT, out errno);
            if (n >= 0 || errno != Errno.EAGAIN || Stopwatch.GetTimestamp() - start > s_spinTicks) return n;
            Thread.SpinWait(50);
        }
    }

    private ChannelException Failed(string what, Errno errno) => _shut
        ? new ChannelException($"{Name}: the channel was shut down", Errno.ECANCELED)
        : new ChannelException($"cannot {what} {Name}: {Posix.Describe(errno == Errno.None ? Errno.EPIPE : errno)}", errno);
}
