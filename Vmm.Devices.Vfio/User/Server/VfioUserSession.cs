using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// One connection of one client: receives commands, executes them in order, replies (vfio-user 6). One thread runs it; the device's
/// threads send DMA messages at the same time. The device is the session's from a good VERSION on; until then the connection touches nothing.
/// Everything that belongs to the connection ends with it (vfio-user S-33).
/// </summary>
internal sealed partial class VfioUserSession : IDisposable
{
    private const int SlowMs = 3000;

    private readonly VfioUserWatchdog _watchdog;
    private readonly VfioUserSocket _socket;
    private readonly VfioUserDevice _device;
    private readonly IVfioUserBackend _backend;
    private readonly ILogger _logger;
    private readonly List<OwnedFd> _fds = new(VfioUserLimits.MessageFds);
    private readonly OwnedFd _wake = Posix.EventFd();
    private uint _maxMessageBytes = VfioUserHeader.Length + VfioUserLimits.ControlBytes; // Of a VERSION; the options' limit afterwards.
    private byte[] _body = new byte[8192];
    private byte[] _reply = new byte[8192];
    /// <summary>Payload of the reply being made, behind its header in <see cref="_reply"/>.</summary>
    private int _replyBytes;
    /// <summary>Descriptor that the reply carries; not owned.</summary>
    private OwnedFd? _replyFd;
    /// <summary>More payload, sent without a copy.</summary>
    private ReadOnlyMemory<byte> _replyData;
    private VfioUserVersion _client = new();
    private VfioUserDmaRequests? _dmaRequests;
    private VfioUserSocket? _twin;
    private Task? _twinReader;
    private VfioUserLegacyMigration? _legacy;
    private long _requestStart = Stopwatch.GetTimestamp();
    private volatile bool _isEnding;

    /// <summary>Takes a connection over.</summary>
    /// <param name="socket">The connection; owned.</param>
    /// <param name="device">What is served; not owned.</param>
    internal VfioUserSession(VfioUserSocket socket, VfioUserDevice device)
    {
        (_socket, _device, _backend, _logger) = (socket, device, device.Backend, device.Options.Logger);
        _watchdog = new VfioUserWatchdog(socket, device.Options.GreetingTimeout, device.Options.StallTimeout);
    }

    /// <summary>The client has gone, and the device is being taken back from it. The socket must be open. Any thread.</summary>
    internal bool IsLeaving => _isEnding || _socket.HasPeerHungUp;

    private VfioUserLegacyMigration Legacy =>
        _legacy ??= new VfioUserLegacyMigration(_device.Fsm, (_backend.MigrationFlags & VfioMigrationFlags.PreCopy) != 0, SetState);

    private VfioUserServerStats Stats => _device.Stats;

    /// <summary>
    /// Serves until the client leaves, breaks the framing, misses a deadline, or the socket is shut down. Afterwards the device has no maps, eventfds or
    /// session of this client.
    /// </summary>
    /// <param name="tryTakeDevice">Called once, when a good VERSION has come: makes the device this session's. False when another client has it.</param>
    /// <returns>Whether the client had the device.</returns>
    internal bool Run(Func<bool> tryTakeDevice)
    {
        string reason = "";
        bool isOwner = false;
        try
        {
            if (!Greet(out VfioUserHeader request, out int bytes, out reason)) return false;
            if (!tryTakeDevice())
            {
                // An answer, so that the client can say why (vfio-user 7); silence would look like a server that hangs.
                ReplyError(request, Errno.EBUSY);
                reason = " (the device has another client)";
                return false;
            }
            isOwner = true;
            if (!Negotiate(request, bytes, out reason)) return true;
            Stats.CountSession();
            VfioUserLog.Connected(_logger, _socket.Name, Math.Min((int)_client.Minor, VfioUserVersion.OurMinor));
            while (Next(out VfioUserHeader header, out Span<byte> body)) Serve(header, body);
        }
        catch (ChannelException e)
        {
            // The ordinary end: clients close the socket without a message (vfio-user 7).
            reason = $" ({VmmException.Describe(e)})";
        }
        finally
        {
            _isEnding = true;
            if (_watchdog.Reason is { } missed) reason = $" ({missed})";
            if (isOwner)
            {
                End();
                VfioUserLog.Disconnected(_logger, _socket.Name, reason, Stats);
            }
            else
            {
                VfioUserLog.NotServed(_logger, _socket.Name, reason);
            }
        }
        return isOwner;
    }

    /// <summary>Ends the connection from another thread.</summary>
    internal void Shutdown()
    {
        IsShut = true;
        _socket.Shutdown();
    }

    /// <summary>Whether <see cref="Shutdown"/> was called.</summary>
    internal bool IsShut { get; private set; }

    public void Dispose()
    {
        _watchdog.Dispose();
        VfioUserSocket.Close(_fds);
        _twin?.Dispose();
        _socket.Dispose();
        _wake.Dispose();
    }

    /// <summary>First message (vfio-user 2): anything but a good VERSION is answered with EINVAL and ends the connection (vfio-user S-9).</summary>
    private bool Greet(out VfioUserHeader header, out int bytes, out string reason)
    {
        reason = "";
        bytes = 0;
        if (!Receive(out header, out Span<byte> body)) return false;
        try
        {
            if (header.Command != VfioUserCommand.Version || !header.IsCommand) throw new VfioUserProtocolException($"{header.Command} before VERSION");
            if (_fds.Count > 0) throw new VfioUserProtocolException($"VERSION with {_fds.Count} descriptors");
            _client = VfioUserVersion.Parse(body);
            if (_client.Major != 0) throw new VfioUserProtocolException($"VERSION: major {_client.Major}, 0 expected");
            bytes = body.Length;
            _maxMessageBytes = (uint)_device.Options.MaxDataXferBytes + VfioUserLimits.MessageHeadBytes;
            return _watchdog.TryGreet();
        }
        catch (VfioUserProtocolException e)
        {
            Stats.CountRefusal();
            ReplyError(header, e.Errno);
            reason = $" ({VmmException.Describe(e)})";
            return false;
        }
    }

    /// <summary>Answers VERSION and opens the way to the client's memory.</summary>
    private bool Negotiate(in VfioUserHeader request, int requestBytes, out string reason)
    {
        reason = "";
        try
        {
            bool twin = _client is { TwinSocket.Supported: true, MaxMsgFds: > 0 } && _device.Options.TwinSocket;
            byte[] payload = new VfioUserVersion
            {
                MaxMsgFds = _device.Options.MaxMsgFds,
                MaxDataXferBytes = _device.Options.MaxDataXferBytes,
                MaxDmaMaps = _device.Options.MaxDmaMaps,
                WriteMultiple = _device.Options.WriteMultiple,
                Migration = _device.Fsm.IsMigratable ? new VfioUserMigrationCapability(VfioUserLimits.PageBytes) : null,
                TwinSocket = twin ? new VfioUserTwinSocket(true, 0) : null,
            }.ToReply(_client, requestBytes);
            OpenDmaRequests(payload, twin, request);
            return true;
        }
        catch (VfioUserProtocolException e)
        {
            Stats.CountRefusal();
            ReplyError(request, e.Errno);
            reason = $" ({VmmException.Describe(e)})";
            return false;
        }
    }

    private void OpenDmaRequests(byte[] version, bool twin, in VfioUserHeader request)
    {
        OwnedFd? theirs = null;
        if (twin)
        {
            (OwnedFd ours, theirs) = Posix.SocketPair();
            _twin = new VfioUserSocket(ours, _socket.Name + " (twin)");
            _watchdog.AddTwin(_twin);
        }
        using (theirs)
        {
            _dmaRequests = new VfioUserDmaRequests(_twin ?? _socket, Math.Min(_client.MaxDataXferBytes, _device.Options.MaxDataXferBytes), Stats);
            version.CopyTo(Payload(version.Length));
            _replyFd = theirs;
            Send(request, Errno.None);
        }
        if (_twin is null)
        {
            _dmaRequests.DeliveringThread = Environment.CurrentManagedThreadId;
            _dmaRequests.Sent = () => Posix.SignalEventFd(_wake);
        }
        else
        {
            _twinReader = WorkerThread.Run("vfu-twin", ReadTwin);
        }
        _device.Dma.Messages = _dmaRequests;
    }

    /// <summary>Receives a message and its body; a size that cannot be right is answered once and ends the connection (vfio-user S-4).</summary>
    private bool Receive(out VfioUserHeader header, out Span<byte> body)
    {
        while (true)
        {
            body = default;
            VfioUserSocket.Close(_fds);
            VfioUserHeader? received = _socket.ReceiveHeader(_fds);
            header = received ?? default;
            if (received is null) return false;
            if (header.SizeBytes < VfioUserHeader.Length || header.SizeBytes > _maxMessageBytes)
            {
                Stats.CountRefusal();
                ReplyError(header, Errno.EINVAL);
                return false;
            }
            // The body is read straight into the buffer of the request that waits for it.
            if (IsDueReply(header)) continue;
            body = Room(ref _body, (int)header.SizeBytes - VfioUserHeader.Length, 0);
            _socket.ReceiveBody(body);
            return true;
        }
    }

    private bool IsDueReply(in VfioUserHeader header) => header.IsReply && _twin is null && _dmaRequests?.TryDeliver(header) == true;

    /// <summary>Executes one command and replies, if a reply is wanted (vfio-user S-29).</summary>
    private void Serve(in VfioUserHeader header, Span<byte> body)
    {
        long start = _requestStart = Stopwatch.GetTimestamp();
        _replyBytes = 0;
        _replyFd = null;
        _replyData = default;
        Stats.CountMessage(header.WantsNoReply);
        Errno errno;
        try
        {
            errno = header.IsCommand ? Execute(header, body) : Errno.EINVAL;
        }
        catch (VmmException e)
        {
            VfioUserLog.DeviceFailed(_logger, _socket.Name, header.Command, VmmException.Describe(e));
            errno = e.Errno == Errno.None ? Errno.EIO : e.Errno;
        }
        if (errno != Errno.None)
        {
            Stats.CountRefusal();
            VfioUserLog.Refused(_logger, _socket.Name, header.Command, errno, header.WantsNoReply ? ", posted" : "");
        }
        if (Stopwatch.GetElapsedTime(start).TotalMilliseconds is > SlowMs and double ms) VfioUserLog.Slow(_logger, _socket.Name, header.Command, (long)ms);
        if (!header.WantsNoReply) Send(header, errno);
    }

    private Errno Execute(in VfioUserHeader header, Span<byte> body) => header.Command switch
    {
        VfioUserCommand.DmaMap => DmaMapCommand(body),
        VfioUserCommand.DmaUnmap => DmaUnmapCommand(body),
        VfioUserCommand.DeviceGetInfo => GetInfo(body),
        VfioUserCommand.DeviceGetRegionInfo => GetRegionInfo(body),
        VfioUserCommand.DeviceGetRegionIoFds => GetRegionIoFds(body),
        VfioUserCommand.DeviceGetIrqInfo => GetIrqInfo(body),
        VfioUserCommand.DeviceSetIrqs => SetIrqs(body),
        VfioUserCommand.RegionRead => RegionRead(body),
        VfioUserCommand.RegionWrite => RegionWrite(body),
        VfioUserCommand.RegionWriteMulti => RegionWriteMulti(body),
        VfioUserCommand.DeviceReset => Reset(),
        VfioUserCommand.DirtyPages => DirtyPages(body),
        VfioUserCommand.DeviceFeature => Feature(body),
        VfioUserCommand.MigDataRead => MigDataRead(body),
        VfioUserCommand.MigDataWrite => MigDataWrite(body),
        // VERSION too, because it must come only once.
        _ => Errno.EINVAL,
    };

    /// <summary>Gets room for a reply's payload; its content is undefined.</summary>
    private Span<byte> Payload(int bytes)
    {
        _replyBytes = bytes;
        return Room(ref _reply, bytes, VfioUserHeader.Length);
    }

    /// <summary>Makes a reply whose payload repeats the request's.</summary>
    private Errno Echo(ReadOnlySpan<byte> payload)
    {
        payload.CopyTo(Payload(payload.Length));
        return Errno.None;
    }

    private static Span<byte> Room(ref byte[] buffer, int bytes, int head)
    {
        if (buffer.Length < head + bytes) buffer = GC.AllocateUninitializedArray<byte>((int)System.Numerics.BitOperations.RoundUpToPowerOf2((uint)(head + bytes)));
        return buffer.AsSpan(head, bytes);
    }

    private void Send(in VfioUserHeader request, Errno errno)
    {
        if (errno != Errno.None)
        {
            ReplyError(request, errno);
            return;
        }
        int size = VfioUserHeader.Length + _replyBytes;
        new VfioUserHeader(request.Id, request.Command, (uint)(size + _replyData.Length), VfioUserHeader.Reply, Errno.None).Write(_reply);
        if (_replyFd is { } fd) _socket.Send(_reply.AsSpan(0, size), [fd]);
        else _socket.Send(_reply.AsSpan(0, size), [], _replyData.Span);
    }

    private void ReplyError(in VfioUserHeader request, Errno errno)
    {
        Span<byte> bytes = stackalloc byte[VfioUserHeader.Length];
        new VfioUserHeader(request.Id, request.Command, VfioUserHeader.Length, VfioUserHeader.Reply | VfioUserHeader.Error, errno).Write(bytes);
        _socket.Send(bytes);
    }

    private void ReadTwin()
    {
        try
        {
            var strays = new List<OwnedFd>();
            while (_twin!.ReceiveHeader(strays) is { } header)
            {
                VfioUserSocket.Close(strays);
                if (header.SizeBytes < VfioUserHeader.Length || header.SizeBytes > _maxMessageBytes || !header.IsReply || !_dmaRequests!.TryDeliver(header)) break;
            }
            VfioUserSocket.Close(strays);
        }
        catch (ChannelException e)
        {
            VfioUserLog.DeviceFailed(_logger, _twin!.Name, VfioUserCommand.DmaRead, VmmException.Describe(e));
        }
        // The twin socket is gone or broke the protocol. Without it the device cannot do DMA, so the whole connection ends.
        _socket.Shutdown();
    }
}
