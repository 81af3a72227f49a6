using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>
/// Framing of vfio-user over one UNIX stream socket, for clients and servers (vfio-user 1.1). One thread receives; any thread sends, and
/// messages never mix. A message goes out in one sendmsg; what comes in may arrive in pieces of any size.
/// </summary>
/// <param name="fd">A connected socket; owned.</param>
/// <param name="name">For errors: the socket's path.</param>
internal sealed class VfioUserSocket(OwnedFd fd, string name) : IDisposable
{
    /// <summary>One and a half of the longest data messages, so that a sender can begin the next while the receiver still reads the last.</summary>
    private const int SendBufferBytes = 3 << 19;

    private readonly Lock _sendGate = new();
    private readonly OwnedFd fd = Widened(fd);
    // When a message that is under way last moved a byte (Environment.TickCount64); 0 between messages.
    private long _receivingSince, _sendingSince;

    /// <summary>For errors.</summary>
    internal string Name => name;

    /// <summary>The socket; this object's.</summary>
    internal OwnedFd Descriptor => fd;

    /// <summary>How long a message has been under way without moving a byte, ms; 0 between messages. Any thread.</summary>
    internal long StalledMs => Math.Max(Since(ref _receivingSince), Since(ref _sendingSince));

    /// <summary>Whether the peer has closed the connection, even if bytes of it are unread. Any thread.</summary>
    internal bool HasPeerHungUp => Posix.Poll(fd, 0, null, 0, out _) != 0;

    /// <summary>Receives the next header and its descriptors, all of which the caller owns.</summary>
    /// <returns>The header, unchecked; null when the peer ended between messages.</returns>
    /// <exception cref="ChannelException">The connection failed, or ended inside the header; nothing was added to <paramref name="fds"/> that stays open.</exception>
    internal VfioUserHeader? ReceiveHeader(List<OwnedFd> fds)
    {
        Span<byte> bytes = stackalloc byte[VfioUserHeader.Length];
        int have = 0;
        while (have < bytes.Length)
        {
            if (have > 0) Volatile.Write(ref _receivingSince, Environment.TickCount64);
            int n = Posix.ReceiveWithFds(fd, bytes[have..], fds, wait: true, out Errno errno);
            if (n > 0) { have += n; continue; }
            if (n == 0 && have == 0) return null;
            Close(fds);
            throw n < 0
                ? Posix.Error($"vfio-user '{name}': receive", errno)
                : new ChannelException($"vfio-user '{name}': the connection ended inside a header, after {have} of 16 bytes", Errno.ECONNRESET);
        }
        Volatile.Write(ref _receivingSince, 0);
        return VfioUserHeader.Read(bytes);
    }

    /// <summary>Waits until there is something to receive.</summary>
    /// <param name="wake">An eventfd that ends the wait; not drained.</param>
    /// <returns>True when a message, or the end, can be received; false when only <paramref name="wake"/> fired.</returns>
    internal bool WaitReadable(OwnedFd wake) => Posix.Poll(fd, Posix.POLLIN, wake, -1, out _) != 0;

    /// <summary>Receives exactly as many bytes as fit.</summary>
    /// <exception cref="ChannelException">The connection failed or ended.</exception>
    internal void ReceiveBody(Span<byte> into)
    {
        int wanted = into.Length;
        while (into.Length > 0)
        {
            Volatile.Write(ref _receivingSince, Environment.TickCount64);
            int n = Posix.Receive(fd, into, 0, out Errno errno);
            if (n < 0) throw Posix.Error($"vfio-user '{name}': receive", errno);
            if (n == 0) throw new ChannelException($"vfio-user '{name}': the connection ended inside a message, {into.Length} of {wanted} bytes short", Errno.ECONNRESET);
            into = into[n..];
        }
        Volatile.Write(ref _receivingSince, 0);
    }

    /// <summary>Receives bytes and drops them.</summary>
    /// <exception cref="ChannelException">The connection failed or ended.</exception>
    internal void SkipBody(long count)
    {
        Span<byte> scratch = stackalloc byte[4096];
        for (; count > 0; count -= Math.Min(count, scratch.Length)) ReceiveBody(scratch[..(int)Math.Min(count, scratch.Length)]);
    }

    /// <summary>Sends one message.</summary>
    /// <param name="message">Header and body.</param>
    /// <param name="fds">At most 16; stay the caller's.</param>
    /// <param name="data">The rest of the body, which the same sendmsg sends without a copy.</param>
    /// <exception cref="ChannelException">The connection failed.</exception>
    internal void Send(ReadOnlySpan<byte> message, ReadOnlySpan<SafeHandle> fds = default, ReadOnlySpan<byte> data = default)
    {
        lock (_sendGate)
        {
            while (message.Length + data.Length > 0)
            {
                Volatile.Write(ref _sendingSince, Environment.TickCount64);
                int n = Posix.SendWithFds(fd, message, data, fds, out Errno errno);
                if (n < 0) throw Posix.Error($"vfio-user '{name}': send", errno);
                data = data[Math.Max(0, n - message.Length)..];
                message = message[Math.Min(n, message.Length)..];
                fds = default;
            }
            Volatile.Write(ref _sendingSince, 0);
        }
    }

    /// <summary>Moves bytes of a body to another socket.</summary>
    /// <returns>How it ended.</returns>
    internal SpliceResult MoveBody(SplicePipe pipe, OwnedFd to, int count) => pipe.MoveBytes(fd, to, count);

    /// <summary>
    /// Sends one message whose last part is moved from another socket. When the move fails, zeros take the place of the missing bytes: the message is
    /// void, but the connection can be used.
    /// </summary>
    /// <param name="message">Header and first part.</param>
    /// <param name="data">Second part.</param>
    /// <param name="pipe">Between the sockets.</param>
    /// <param name="from">Where the rest comes from.</param>
    /// <param name="count">Bytes of the rest.</param>
    /// <returns>Why the rest could not be read, or None.</returns>
    /// <exception cref="ChannelException">This connection failed.</exception>
    internal Errno SendMoving(ReadOnlySpan<byte> message, ReadOnlySpan<byte> data, SplicePipe pipe, OwnedFd from, int count)
    {
        lock (_sendGate)
        {
            Send(message, data: data);
            SpliceResult moved = pipe.MoveBytes(from, fd, count);
            if (moved.FailedSide == SpliceSide.To) throw Posix.Error($"vfio-user '{name}': send", moved.Errno);
            if (moved.FailedSide == SpliceSide.None) return Errno.None;
            Span<byte> zeros = stackalloc byte[4096];
            zeros.Clear();
            for (int left = count - moved.DeliveredBytes; left > 0; left -= Math.Min(left, zeros.Length)) Send(zeros[..Math.Min(left, zeros.Length)]);
            return moved.Errno;
        }
    }

    /// <summary>Ends the connection; pending receives and sends return. Idempotent.</summary>
    internal void Shutdown() => Posix.ShutdownSocket(fd, Posix.SHUT_RDWR);

    /// <summary>Closes the socket. No call may be running; call <see cref="Shutdown"/> before.</summary>
    public void Dispose() => fd.Dispose();

    private static long Since(ref long tick) => Volatile.Read(ref tick) is var since and not 0 ? Environment.TickCount64 - since : 0;

    private static OwnedFd Widened(OwnedFd fd)
    {
        Posix.WidenSendBuffer(fd, SendBufferBytes);
        return fd;
    }

    /// <summary>Closes descriptors that are not wanted.</summary>
    internal static void Close(List<OwnedFd> fds)
    {
        foreach (OwnedFd one in fds) one.Dispose();
        fds.Clear();
    }
}
