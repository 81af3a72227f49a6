using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Tests.Support;

/// <summary>One message that the scripted server received. The message owns its descriptors.</summary>
internal sealed record VfioUserMessage(VfioUserHeader Header, byte[] Body, List<OwnedFd> Fds) : IDisposable
{
    internal VfioUserCommand Command => Header.Command;

    /// <summary>Region and offset of a register access.</summary>
    internal VfioUserRegionAccess Access => VfioUserRegionAccess.TryRead(Body, out VfioUserRegionAccess access) ? access : throw new AssertionException($"{Command} of {Body.Length} bytes");

    internal VfioUserFeature Feature => VfioUserFeature.TryRead(Body, out VfioUserFeature feature) ? feature : throw new AssertionException($"{Command} of {Body.Length} bytes");

    internal bool IsFeature(VfioDeviceFeature feature, VfioFeatureOp op) => Command == VfioUserCommand.DeviceFeature && Feature.Feature == feature && Feature.Op == op;

    public void Dispose() => VfioUserSocket.Close(Fds);
}

/// <summary>
/// A vfio-user server over a socketpair, for tests of the client. It shares no code with our server and can misbehave: fragment, delay and
/// falsify messages. By default it is a small device (config space, one BAR) that answers everything. Handlers replace the answers to single
/// commands, a script replaces the whole server.
/// </summary>
internal sealed class ScriptedVfioUserServer : IDisposable
{
    private readonly OwnedFd _socket;
    private readonly Dictionary<VfioUserCommand, Action<VfioUserMessage>> _handlers = [];
    private readonly List<VfioUserMessage> _received = [];
    private readonly Action<ScriptedVfioUserServer>? _script;
    private Task? _thread;

    /// <param name="script">Replaces the whole server.</param>
    /// <param name="socket">A connection that was accepted; owned. Null for a socketpair.</param>
    internal ScriptedVfioUserServer(Action<ScriptedVfioUserServer>? script = null, OwnedFd? socket = null)
    {
        (_socket, ClientSocket) = socket is null ? Posix.SocketPair() : (socket, socket);
        _script = script;
        On(VfioUserCommand.Version, m => Reply(m, new VfioUserVersion { MaxMsgFds = 8, Migration = HasMigration ? new VfioUserMigrationCapability(4096) : null }.ToReply(VfioUserVersion.Parse(m.Body), m.Body.Length)));
        On(VfioUserCommand.DmaMap, m => Reply(m));
        On(VfioUserCommand.DmaUnmap, m => Reply(m, m.Body));
        On(VfioUserCommand.DeviceGetInfo, m => Reply(m, Bytes(16, b => new VfioUserDeviceInfo(16, 3, Regions, Irqs).Write(b))));
        On(VfioUserCommand.DeviceGetRegionInfo, m =>
        {
            VfioUserRegionInfo.TryRead(m.Body, out VfioUserRegionInfo ask);
            ulong size = ask.Index switch { 0 => 0x4000, 7 => 256, _ => 0 };
            Reply(m, Bytes(32, b => new VfioUserRegionInfo(32, size > 0 ? 3u : 0, ask.Index, 0, size, 0).Write(b)));
        });
        On(VfioUserCommand.DeviceGetIrqInfo, m =>
        {
            VfioUserIrqInfo.TryRead(m.Body, out VfioUserIrqInfo ask);
            Reply(m, Bytes(16, b => new VfioUserIrqInfo(16, 1, ask.Index, ask.Index == 2 ? 32u : 1).Write(b)));
        });
        On(VfioUserCommand.DeviceSetIrqs, m => Reply(m));
        On(VfioUserCommand.DeviceReset, m => Reply(m));
        On(VfioUserCommand.RegionRead, m => Reply(m, [.. m.Body, .. new byte[m.Access.Count]]));
        On(VfioUserCommand.RegionWrite, m =>
        {
            if (!m.Header.WantsNoReply) Reply(m, m.Body[..16]);
        });
        On(VfioUserCommand.DeviceFeature, m => Error(m, Errno.EINVAL));
    }

    /// <summary>The client's end of the socketpair. The client owns it.</summary>
    internal OwnedFd ClientSocket { get; }

    /// <summary>Whether the server sends everything byte by byte.</summary>
    internal bool Fragments { get; set; }

    internal bool HasMigration { get; init; }

    internal uint Regions { get; set; } = 9;

    internal uint Irqs { get; set; } = 5;

    /// <summary>The messages received so far.</summary>
    internal List<VfioUserMessage> Received
    {
        get
        {
            lock (_received) return [.. _received];
        }
    }

    /// <summary>Replaces the answer to one command.</summary>
    internal ScriptedVfioUserServer On(VfioUserCommand command, Action<VfioUserMessage> handler)
    {
        _handlers[command] = handler;
        return this;
    }

    /// <summary>Replaces the answer to one operation on one feature.</summary>
    internal ScriptedVfioUserServer OnFeature(VfioDeviceFeature feature, VfioFeatureOp op, Action<VfioUserMessage> handler)
    {
        Action<VfioUserMessage> before = _handlers[VfioUserCommand.DeviceFeature];
        return On(VfioUserCommand.DeviceFeature, m => (m.IsFeature(feature, op) ? handler : before)(m));
    }

    /// <summary>Answers PROBE and SET of these features as libvfio-user does, with the payload of the request.</summary>
    internal ScriptedVfioUserServer KnowsFeatures(params VfioDeviceFeature[] features)
    {
        foreach (VfioDeviceFeature feature in features)
            foreach (VfioFeatureOp op in (VfioFeatureOp[])[VfioFeatureOp.Probe, VfioFeatureOp.Probe | VfioFeatureOp.Set, VfioFeatureOp.Set]) OnFeature(feature, op, m => Reply(m, m.Body));
        return this;
    }

    internal ScriptedVfioUserServer Start()
    {
        _thread = WorkerThread.Run("test/vfio-user", () =>
        {
            try
            {
                (_script ?? (static s => s.Serve()))(this);
            }
            catch (PeerGone)
            {
                // The client closed the connection, as it does at the end of every test.
            }
        });
        return this;
    }

    /// <summary>Answers messages until the client closes the connection.</summary>
    internal void Serve()
    {
        while (true) Answer(Receive());
    }

    /// <summary>Answers one message through its handler.</summary>
    internal void Answer(VfioUserMessage message)
    {
        if (_handlers.TryGetValue(message.Command, out Action<VfioUserMessage>? handler)) handler(message);
        else Error(message, Errno.EINVAL);
    }

    /// <summary>Whether an unread message is there.</summary>
    internal bool HasMessage => Posix.Poll(_socket, Posix.POLLIN, null, 0, out _) != 0;

    /// <summary>Receives the next message.</summary>
    internal VfioUserMessage Receive() => Receive(_socket);

    internal VfioUserMessage Receive(OwnedFd socket)
    {
        var fds = new List<OwnedFd>();
        byte[] head = new byte[16];
        ReadAll(socket, head, fds);
        VfioUserHeader header = VfioUserHeader.Read(head);
        byte[] body = new byte[header.SizeBytes - 16];
        ReadAll(socket, body, fds);
        var message = new VfioUserMessage(header, body, fds);
        lock (_received) _received.Add(message);
        return message;
    }

    /// <summary>Receives the next message without an entry in <see cref="Received"/>.</summary>
    internal VfioUserHeader ReceiveInto(byte[] body)
    {
        Span<byte> head = stackalloc byte[16];
        ReadAll(_socket, head, []);
        VfioUserHeader header = VfioUserHeader.Read(head);
        ReadAll(_socket, body.AsSpan(0, (int)header.SizeBytes - 16), []);
        return header;
    }

    /// <summary>Receives the next message, which must have this command.</summary>
    internal VfioUserMessage Expect(VfioUserCommand command)
    {
        VfioUserMessage message = Receive();
        return message.Command == command ? message : throw new AssertionException($"{message.Command} came, {command} was expected");
    }

    /// <summary>Count of bytes that one receive finds, and the size in the next message's header. The bytes stay unread.</summary>
    internal int PeekWhole(out int said)
    {
        byte[] all = new byte[300_000];
        int n = Posix.Receive(_socket, all, Posix.MSG_PEEK, out _);
        said = n >= 16 ? (int)VfioUserHeader.Read(all).SizeBytes : 0;
        return n;
    }

    internal void Reply(VfioUserMessage to, byte[]? body = null, params OwnedFd[] fds) => Reply(_socket, to, body, fds);

    internal void Reply(OwnedFd socket, VfioUserMessage to, byte[]? body = null, params OwnedFd[] fds) =>
        Raw(socket, Message(to.Header.Id, to.Command, VfioUserHeader.Reply, Errno.None, body ?? []), fds);

    internal void Error(VfioUserMessage to, Errno errno)
    {
        if (!to.Header.WantsNoReply) Raw(Message(to.Header.Id, to.Command, VfioUserHeader.Reply | VfioUserHeader.Error, errno, []));
    }

    /// <summary>Sends a command to the client and receives the reply.</summary>
    internal VfioUserMessage Ask(VfioUserCommand command, byte[] body, OwnedFd? socket = null, ushort id = 0x8000)
    {
        Raw(socket ?? _socket, Message(id, command, 0, Errno.None, body));
        VfioUserMessage reply = Receive(socket ?? _socket);
        Assert.That((reply.Header.Id, reply.Command, reply.Header.IsReply), Is.EqualTo((id, command, true)));
        return reply;
    }

    /// <summary>Sends any bytes.</summary>
    internal void Raw(byte[] bytes, params OwnedFd[] fds) => Raw(_socket, bytes, fds);

    internal void Raw(ReadOnlySpan<byte> bytes) => Raw(_socket, bytes);

    internal void Raw(OwnedFd socket, ReadOnlySpan<byte> left, params OwnedFd[] fds)
    {
        SafeHandle[]? handles = fds;
        while (left.Length > 0)
        {
            int n = Posix.SendWithFds(socket, Fragments ? left[..1] : left, handles, out Errno errno);
            if (n < 0) throw new PeerGone(errno);
            left = left[n..];
            handles = null;
        }
    }

    internal static byte[] Message(ushort id, VfioUserCommand command, uint flags, Errno errno, byte[] body)
    {
        byte[] bytes = new byte[16 + body.Length];
        new VfioUserHeader(id, command, (uint)bytes.Length, flags, errno).Write(bytes);
        body.CopyTo(bytes, 16);
        return bytes;
    }

    internal static byte[] Bytes(int length, Action<byte[]> fill)
    {
        byte[] bytes = new byte[length];
        fill(bytes);
        return bytes;
    }

    internal static byte[] Dma(ulong address, ulong count, byte[]? data = null) => [.. Bytes(16, b => new VfioUserDmaAccess(address, count).Write(b)), .. data ?? []];

    /// <summary>Closes the connection, as the death of the server's process does.</summary>
    internal void Hangup() => Posix.ShutdownSocket(_socket, Posix.SHUT_RDWR);

    /// <summary>Waits for the thread and rethrows its failure. Dispose the client first, because the thread ends when the connection closes.</summary>
    public void Dispose()
    {
        Hangup();
        try
        {
            if (_thread is not null && !_thread.Wait(TimeSpan.FromSeconds(10))) Assert.Fail("the scripted server did not end in time");
        }
        finally
        {
            _socket.Dispose();
            if (_thread is null) ClientSocket.Dispose();
            foreach (VfioUserMessage one in Received) one.Dispose();
        }
    }

    private static void ReadAll(OwnedFd socket, Span<byte> into, List<OwnedFd> fds)
    {
        while (into.Length > 0)
        {
            int n = Posix.ReceiveWithFds(socket, into, fds, wait: true, out Errno errno);
            if (n <= 0)
            {
                VfioUserSocket.Close(fds);
                throw new PeerGone(errno);
            }
            into = into[n..];
        }
    }

    private sealed class PeerGone(Errno errno) : Exception($"the client is gone ({errno})");
}
