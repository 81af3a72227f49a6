using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// One request of a <see cref="VfioUserClient"/> and its reply. The buffers are reused, so a message allocates only when it is longer than those
/// before. Owned by one thread at a time: <see cref="Body"/>, then <see cref="Send"/>, then <see cref="Wait"/>; dispose returns it to the pool.
/// </summary>
internal sealed class VfioUserExchange(VfioUserClient client) : IDisposable
{
    /// <summary>How long a waiter polls before it sleeps: about the cost of two thread switches (docs/benchmarks.md).</summary>
    private const double SpinMicroseconds = 30;
    private static readonly bool s_spins = Environment.ProcessorCount > 1;

    private readonly object _wake = new();
    private volatile bool _isDone;
    private byte[] _message = new byte[256];
    private byte[] _reply = new byte[256];
    private int _messageBytes = VfioUserHeader.Length, _replyBytes;
    private bool _pooled, _isAbandoned;

    /// <summary>Set by the client while the request is on its way.</summary>
    internal ushort Id { get; set; }

    internal VfioUserCommand Command { get; private set; }

    /// <summary>Longest reply body that is taken; anything longer breaks the protocol.</summary>
    internal int MaxReplyBytes { get; private set; }

    /// <summary>The server's answer; ENODEV when the connection is gone.</summary>
    internal Errno Result { get; private set; }

    /// <summary>Body of the reply; empty after an error.</summary>
    internal ReadOnlySpan<byte> Reply => _reply.AsSpan(0, _replyBytes);

    /// <summary>Descriptors of the reply; those left here are closed by <see cref="Dispose"/>.</summary>
    internal List<OwnedFd> ReplyFds { get; } = [];

    /// <summary>Consumes the body of a good reply behind its first 8 bytes, on the receiver's thread; null to get it in <see cref="Reply"/>.</summary>
    internal VfioUserBodySink? BodySink { get; set; }

    /// <summary>How many descriptors the reply may carry; the rest are closed on arrival.</summary>
    internal int WantedFds { get; set; }

    /// <summary>Room for the request's body behind the header.</summary>
    /// <param name="bytes">Length of the body.</param>
    /// <returns>The room; its old content is undefined.</returns>
    internal Span<byte> Body(int bytes)
    {
        _messageBytes = VfioUserHeader.Length + bytes;
        if (_message.Length < _messageBytes) _message = new byte[_messageBytes];
        return _message.AsSpan(VfioUserHeader.Length, bytes);
    }

    /// <summary>Sends the request.</summary>
    /// <param name="command">Command.</param>
    /// <param name="maxReplyBytes">Longest body of a good reply; raised to the limit of control messages.</param>
    /// <param name="fds">Descriptors to pass; at most what the server takes.</param>
    /// <param name="noReply">Posted: nothing comes back, <see cref="Wait"/> must not be called.</param>
    /// <param name="data">The rest of the body, sent without a copy.</param>
    /// <returns>None, or ENODEV.</returns>
    internal Errno Send(VfioUserCommand command, int maxReplyBytes = 0, ReadOnlySpan<OwnedFd?> fds = default, bool noReply = false, ReadOnlySpan<byte> data = default)
    {
        Prepare(command, maxReplyBytes);
        return client.Send(this, _message.AsSpan(0, _messageBytes), data, fds, noReply);
    }

    /// <summary>Sends the request, its last part moved from another socket.</summary>
    /// <param name="command">Command.</param>
    /// <param name="data">The bytes before that part.</param>
    /// <param name="pipe">Between the sockets.</param>
    /// <param name="from">Where the last part comes from.</param>
    /// <param name="count">Length of that part in bytes.</param>
    /// <param name="broken">Why that part could not be read; the server then got zeros in its place, and still answers.</param>
    /// <returns>None, or ENODEV.</returns>
    internal Errno SendMoving(VfioUserCommand command, ReadOnlySpan<byte> data, SplicePipe pipe, OwnedFd from, int count, out Errno broken)
    {
        Prepare(command, 0);
        return client.SendMoving(this, _message.AsSpan(0, _messageBytes), data, pipe, from, count, out broken);
    }

    /// <summary>Waits for the reply.</summary>
    /// <param name="timeoutMs">Limit; after it the connection is closed, because a late reply could be taken for another's.</param>
    /// <returns>The server's answer; ENODEV when the connection is gone.</returns>
    internal Errno Wait(int timeoutMs)
    {
        if (s_spins) SpinAWhile();
        long end = Environment.TickCount64 + timeoutMs;
        lock (_wake)
        {
            while (!_isDone)
            {
                long left = end - Environment.TickCount64;
                if (left > 0 && Monitor.Wait(_wake, (int)left)) continue;
                if (_isDone || !client.IsMoving) break;
                // The server has answered, and the reply is still being moved to the other socket.
                end = Environment.TickCount64 + timeoutMs;
            }
            if (_isDone) return Result;
            _isAbandoned = true;
        }
        client.TimedOut(this, timeoutMs);
        return Errno.ENODEV; // Also when the receiver completes it now.
    }

    /// <summary>Polls for a short time, because a register's answer comes sooner than a sleeping thread could wake.</summary>
    private void SpinAWhile()
    {
        long start = Stopwatch.GetTimestamp();
        while (!_isDone && Stopwatch.GetElapsedTime(start).TotalMicroseconds < SpinMicroseconds) Thread.SpinWait(8);
    }

    /// <summary>Sends and waits.</summary>
    internal Errno Run(VfioUserCommand command, int maxReplyBytes = 0, ReadOnlySpan<OwnedFd?> fds = default, int? timeoutMs = null, ReadOnlySpan<byte> data = default)
    {
        Errno errno = Send(command, maxReplyBytes, fds, data: data);
        if (errno == Errno.None) errno = Wait(timeoutMs ?? client.TimeoutMs);
        client.Recorder?.Record(command, _message.AsSpan(VfioUserHeader.Length, _messageBytes - VfioUserHeader.Length), errno, Reply, ReplyFds);
        return errno;
    }

    /// <summary>Room for the reply's body. Receiver thread.</summary>
    internal Span<byte> ReplyBuffer(int bytes)
    {
        if (_reply.Length < bytes) _reply = new byte[bytes];
        return _reply.AsSpan(0, bytes);
    }

    /// <summary>Completes the request. Receiver thread, or the thread that found the connection broken.</summary>
    /// <param name="result">The answer.</param>
    /// <param name="replyBytes">Length of its body.</param>
    /// <param name="fds">Descriptors that came with it; takes those that the reply may carry, unless the waiter has given up.</param>
    internal void Complete(Errno result, int replyBytes, List<OwnedFd>? fds = null)
    {
        lock (_wake)
        {
            if (fds is not null && !_isAbandoned)
            {
                int wanted = Math.Min(WantedFds, fds.Count);
                for (int i = 0; i < wanted; i++) ReplyFds.Add(fds[i]);
                fds.RemoveRange(0, wanted);
            }
            Result = result;
            _replyBytes = replyBytes;
            _isDone = true;
            Monitor.Pulse(_wake);
        }
    }

    private void Prepare(VfioUserCommand command, int maxReplyBytes)
    {
        Command = command;
        MaxReplyBytes = Math.Max(maxReplyBytes, VfioUserLimits.ControlBytes);
        _replyBytes = 0;
        Result = Errno.None;
        _isDone = false;
    }

    internal void Rented()
    {
        _pooled = _isAbandoned = false;
        WantedFds = 0;
        BodySink = null;
        _messageBytes = VfioUserHeader.Length;
    }

    /// <summary>Returns it to the pool. After a broken connection it is dropped instead, because the receiver may still write into it.</summary>
    public void Dispose()
    {
        if (_pooled) return;
        _pooled = true;
        // A request that could not be sent was never waited for; the receiver may still complete it.
        lock (_wake) _isAbandoned = true;
        VfioUserSocket.Close(ReplyFds);
        client.Return(this);
    }
}

/// <summary>Consumes the rest of a reply's body from its socket; on the receiver's thread.</summary>
/// <param name="socket">Where the rest is.</param>
/// <param name="head">The first 8 bytes.</param>
/// <param name="rest">Number of bytes, all of which must be consumed. An exception ends the connection.</param>
internal delegate void VfioUserBodySink(VfioUserSocket socket, ReadOnlySpan<byte> head, int rest);
