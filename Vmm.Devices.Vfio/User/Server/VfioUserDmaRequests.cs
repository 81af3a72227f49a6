using System.Buffers;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// DMA_READ and DMA_WRITE to the client (vfio-user 3.10). Device threads send requests and wait; the thread that reads the socket delivers the
/// replies. The server numbers these requests itself. A client that does not answer in time loses the connection, because a late reply could
/// not be told from a stray one.
/// </summary>
/// <param name="socket">The twin socket, or the session's.</param>
/// <param name="chunkBytes">The client's max_data_xfer_size.</param>
/// <param name="stats">Counters.</param>
internal sealed class VfioUserDmaRequests(VfioUserSocket socket, int chunkBytes, VfioUserServerStats stats) : IDmaMessages, IDisposable
{
    private const int HeadBytes = VfioUserHeader.Length + VfioUserDmaAccess.Length;

    private readonly object _gate = new();
    private readonly Dictionary<ushort, Pending> _pending = [];
    private ushort _nextId;
    private int _asking;
    private bool _ended;

    /// <summary>Id of the thread that delivers replies, which must not wait for one itself (vfio-user S-30).</summary>
    internal int DeliveringThread { get; set; }

    /// <summary>Called after each request, because the thread that should read its reply may be waiting for something else.</summary>
    internal Action? Sent { get; set; }

    /// <summary>True while replies are missing.</summary>
    internal bool HasPending
    {
        get { lock (_gate) return _pending.Count > 0; }
    }

    public Errno Read(ulong address, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            int n = Math.Min(destination.Length, chunkBytes);
            using var pending = new Pending(VfioUserCommand.DmaRead, new VfioUserDmaAccess(address, (ulong)n), n);
            Errno errno = Ask(pending, []);
            if (errno != Errno.None) return errno;
            pending.Data.AsSpan(0, n).CopyTo(destination);
            destination = destination[n..];
            address += (uint)n;
        }
        return Errno.None;
    }

    public Errno Write(ulong address, ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            int n = Math.Min(source.Length, chunkBytes);
            using var pending = new Pending(VfioUserCommand.DmaWrite, new VfioUserDmaAccess(address, (ulong)n), 0);
            Errno errno = Ask(pending, source[..n]);
            if (errno != Errno.None) return errno;
            source = source[n..];
            address += (uint)n;
        }
        return Errno.None;
    }

    /// <summary>Receives a reply's body and delivers it, if a request waits for it.</summary>
    /// <param name="header">A reply's header; its size was checked against the message limit.</param>
    /// <returns>False when no request waits for it; the body is then still in the socket.</returns>
    /// <exception cref="ChannelException">The connection failed.</exception>
    internal bool TryDeliver(in VfioUserHeader header)
    {
        Pending? pending;
        lock (_gate)
        {
            if (!_pending.TryGetValue(header.Id, out pending) || pending.Command != header.Command || !_pending.Remove(header.Id)) return false;
        }
        Errno errno = Errno.EPROTO;
        try
        {
            errno = Take(pending, header);
        }
        finally
        {
            pending.Complete(errno);
        }
        return true;
    }

    /// <summary>Ends all waits with an error; called when the connection has ended and its socket is shut down.</summary>
    internal void End()
    {
        lock (_gate)
        {
            _ended = true;
            foreach (Pending one in _pending.Values) one.Complete(Errno.ENOTCONN);
            _pending.Clear();
        }
    }

    /// <summary>Ends all waits, and waits until no thread uses the socket any more.</summary>
    public void Dispose()
    {
        End();
        lock (_gate)
            while (_asking > 0) Monitor.Wait(_gate);
    }

    private Errno Take(Pending pending, in VfioUserHeader header)
    {
        int body = (int)header.SizeBytes - VfioUserHeader.Length;
        if (header.IsError)
        {
            socket.SkipBody(body);
            return header.Errno == Errno.None ? Errno.EIO : header.Errno;
        }
        // Older clients answer a write with the bare header (vfio-user S-22).
        if (body == 0 && pending.Command == VfioUserCommand.DmaWrite) return Errno.None;
        if (body != VfioUserDmaAccess.Length + pending.DataBytes)
        {
            socket.SkipBody(body);
            return Errno.EPROTO;
        }
        Span<byte> head = stackalloc byte[VfioUserDmaAccess.Length];
        socket.ReceiveBody(head);
        socket.ReceiveBody(pending.Data.AsSpan(0, pending.DataBytes));
        VfioUserDmaAccess.TryRead(head, out VfioUserDmaAccess echo);
        return echo == pending.Access ? Errno.None : Errno.EPROTO;
    }

    private Errno Ask(Pending pending, ReadOnlySpan<byte> data)
    {
        if (Environment.CurrentManagedThreadId == DeliveringThread) return Errno.EDEADLK;
        ushort id;
        lock (_gate)
        {
            if (_ended) return Errno.ENOTCONN;
            if (_pending.Count >= ushort.MaxValue) return Errno.EBUSY;
            do id = _nextId++; while (_pending.ContainsKey(id));
            _pending[id] = pending;
            _asking++;
        }
        try
        {
            stats.CountDmaMessage();
            return SendAndWait(pending, id, data);
        }
        finally
        {
            lock (_gate)
            {
                _asking--;
                Monitor.PulseAll(_gate);
            }
        }
    }

    private Errno SendAndWait(Pending pending, ushort id, ReadOnlySpan<byte> data)
    {
        int size = HeadBytes + data.Length;
        byte[] message = ArrayPool<byte>.Shared.Rent(size);
        try
        {
            new VfioUserHeader(id, pending.Command, (uint)size, 0, Errno.None).Write(message);
            pending.Access.Write(message.AsSpan(VfioUserHeader.Length));
            data.CopyTo(message.AsSpan(HeadBytes));
            socket.Send(message.AsSpan(0, size));
        }
        catch (ChannelException e)
        {
            if (!Forget(id)) pending.Wait(null);
            return e.Errno;
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(message);
        }
        Sent?.Invoke();
        if (pending.Wait(VfioUserDeadlines.DmaAnswer)) return pending.Result;
        // Not pending any more, so the reply may be arriving this moment: the buffer must stay until it has been filled.
        if (!Forget(id)) pending.Wait(null);
        socket.Shutdown();
        return Errno.ETIMEDOUT;
    }

    private bool Forget(ushort id)
    {
        lock (_gate) return _pending.Remove(id);
    }

    /// <summary>One request on its way.</summary>
    private sealed class Pending(VfioUserCommand command, VfioUserDmaAccess access, int dataBytes) : IDisposable
    {
        private readonly object _gate = new();
        private bool _done;

        internal VfioUserCommand Command => command;

        internal VfioUserDmaAccess Access => access;

        internal int DataBytes => dataBytes;

        internal byte[] Data { get; } = dataBytes == 0 ? [] : ArrayPool<byte>.Shared.Rent(dataBytes);

        internal Errno Result { get; private set; }

        /// <summary>Waits for the answer.</summary>
        /// <param name="limit">Limit; null for none.</param>
        internal bool Wait(TimeSpan? limit)
        {
            long start = Environment.TickCount64;
            lock (_gate)
            {
                while (!_done)
                {
                    int left = limit is { } t ? (int)(t.TotalMilliseconds - (Environment.TickCount64 - start)) : -1;
                    if (limit is not null && left <= 0) return false;
                    Monitor.Wait(_gate, left);
                }
                return true;
            }
        }

        internal void Complete(Errno result)
        {
            lock (_gate)
            {
                Result = result;
                _done = true;
                Monitor.PulseAll(_gate);
            }
        }

        public void Dispose()
        {
            if (Data.Length > 0) ArrayPool<byte>.Shared.Return(Data);
        }
    }
}
