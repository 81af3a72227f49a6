using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// Body of a receiver thread: reads one socket until its end, gives each reply to its request, and serves DMA commands (vfio-user 3.10).
/// It never takes the BQL, so a server may do DMA while a vCPU waits for its register access (vfio-user 6, deadlock).
/// </summary>
internal sealed class VfioUserReceiver(VfioUserClient client, VfioUserSocket socket, IVfioUserDma dma)
{
    private const int DmaHead = VfioUserHeader.Length + VfioUserDmaAccess.Length;
    private const int SinkHead = 8;
    private readonly List<OwnedFd> _fds = [];
    private byte[] _buffer = new byte[4096];

    /// <summary>Receives until the connection ends.</summary>
    /// <param name="pause">Eventfd that ends the wait for a message when the connection is suspended; null when a reply ends the wait instead.</param>
    /// <returns>True when the connection is suspended between two messages.</returns>
    /// <exception cref="VmmException">The connection ended; also when the server closed it in order.</exception>
    internal bool Run(OwnedFd? pause = null)
    {
        try
        {
            while (true)
            {
                if (pause is not null && !socket.WaitReadable(pause)) return true;
                if (socket.ReceiveHeader(_fds) is not { } header) break;
                if (header.SizeBytes < VfioUserHeader.Length) throw Broken(header, $"its size is {header.SizeBytes}, less than a header");
                if (header.IsReply) TakeReply(header);
                else if (header.IsCommand) Serve(header);
                else throw Broken(header, $"its type is {header.Flags & VfioUserHeader.TypeMask}, neither command nor reply");
                VfioUserSocket.Close(_fds);
                client.LowerReceivers();
                if (client.IsPausing && (pause is not null || client.IsIdle)) return true;
            }
            throw new ChannelException($"vfio-user '{socket.Name}': the server ended the connection", Errno.ECONNRESET);
        }
        finally
        {
            VfioUserSocket.Close(_fds);
        }
    }

    private void TakeReply(VfioUserHeader header)
    {
        VfioUserExchange exchange = client.TakePending(header);
        int length;
        try
        {
            uint body = header.SizeBytes - VfioUserHeader.Length;
            if (body > exchange.MaxReplyBytes) throw Broken(header, $"a reply of {body} bytes, at most {exchange.MaxReplyBytes} are expected");
            length = (int)body;
            if (exchange.BodySink is { } sink && !header.IsError && length >= SinkHead) length = Pass(exchange, sink, length);
            else socket.ReceiveBody(exchange.ReplyBuffer(length));
        }
        catch (VmmException e)
        {
            // The request is no longer in the table, so its waiter is woken here, after the reason for its ENODEV was stored.
            client.Fail(e);
            exchange.Complete(Errno.ENODEV, 0);
            throw;
        }
        // An error reply is a bare header; what a server adds to one is dropped. Errno 0 with the error bit set happens (vfio-user 1).
        if (header.IsError) exchange.Complete(header.Errno == Errno.None ? Errno.EIO : header.Errno, 0, _fds);
        else exchange.Complete(Errno.None, length, _fds);
    }

    private int Pass(VfioUserExchange exchange, VfioUserBodySink sink, int length)
    {
        Span<byte> head = exchange.ReplyBuffer(SinkHead);
        socket.ReceiveBody(head);
        client.IsMoving = true;
        try
        {
            sink(socket, head, length - SinkHead);
        }
        finally
        {
            client.IsMoving = false;
        }
        return SinkHead;
    }

    private void Serve(VfioUserHeader header)
    {
        uint body = header.SizeBytes - VfioUserHeader.Length;
        // The body of a refused command is skipped, up to the largest DMA_WRITE that any peer may negotiate; more breaks the protocol.
        if (body > VfioUserLimits.MaxDataXferBytes + VfioUserLimits.DataHeadBytes) throw Broken(header, $"a command of {body} bytes");
        Span<byte> fixedPart = stackalloc byte[VfioUserDmaAccess.Length];
        if (header.Command is not (VfioUserCommand.DmaRead or VfioUserCommand.DmaWrite))
        {
            socket.SkipBody(body);
            Refuse(header, Errno.ENOSYS);
            return;
        }
        if (body < VfioUserDmaAccess.Length)
        {
            socket.SkipBody(body);
            Refuse(header, Errno.EINVAL);
            return;
        }
        socket.ReceiveBody(fixedPart);
        VfioUserDmaAccess.TryRead(fixedPart, out VfioUserDmaAccess access);
        uint rest = body - VfioUserDmaAccess.Length;
        bool isWrite = header.Command == VfioUserCommand.DmaWrite;
        Errno errno = access.Count > VfioUserLimits.DataXferBytes ? Errno.E2BIG : rest != (isWrite ? access.Count : 0) ? Errno.EINVAL : Errno.None;
        if (errno != Errno.None)
        {
            socket.SkipBody(rest);
            Refuse(header, errno);
            return;
        }
        int count = (int)access.Count;
        if (_buffer.Length < DmaHead + count) _buffer = new byte[DmaHead + count];
        Span<byte> data = _buffer.AsSpan(DmaHead, count);
        if (isWrite) socket.ReceiveBody(data);
        errno = isWrite ? dma.Write(access.Address, data) : dma.Read(access.Address, data);
        if (errno != Errno.None)
        {
            Refuse(header, errno);
            return;
        }
        if (header.WantsNoReply) return;
        int size = isWrite ? DmaHead : DmaHead + count;
        new VfioUserHeader(header.Id, header.Command, (uint)size, VfioUserHeader.Reply, Errno.None).Write(_buffer);
        access.Write(_buffer.AsSpan(VfioUserHeader.Length));
        client.SendGuarded(socket, _buffer.AsSpan(0, size), default);
    }

    private void Refuse(VfioUserHeader header, Errno errno)
    {
        if (header.WantsNoReply) return;
        Span<byte> reply = stackalloc byte[VfioUserHeader.Length];
        new VfioUserHeader(header.Id, header.Command, VfioUserHeader.Length, VfioUserHeader.Reply | VfioUserHeader.Error, errno).Write(reply);
        client.SendGuarded(socket, reply, default);
    }

    private VfioUserProtocolException Broken(VfioUserHeader header, string what) =>
        new($"vfio-user '{socket.Name}': message {header.Id} ({header.Command}): {what}");
}
