using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Tests.Support;

/// <summary>A message from a vfio-user server, with its descriptors.</summary>
internal sealed record VfioUserReply(VfioUserHeader Header, byte[] Payload, IReadOnlyList<OwnedFd> Fds) : IDisposable
{
    public void Dispose()
    {
        foreach (OwnedFd fd in Fds) fd.Dispose();
    }
}

/// <summary>A client that sends any message, valid or not, and gives a test every byte of the reply. One thread uses it.</summary>
internal sealed class RawVfioUserClient(OwnedFd socket) : IDisposable
{
    internal const string Json = """{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"migration":{"pgsize":4096},"write_multiple":true,"pgsizes":4096}}""";
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);
    private readonly VfioUserSocket _socket = new(socket, "test");
    private ushort _id = 0x4000;

    /// <summary>Encodes fields in little endian: uint, ulong, int (as uint), ushort, byte, byte[].</summary>
    internal static byte[] Bytes(params object[] fields)
    {
        var bytes = new List<byte>();
        foreach (object field in fields)
        {
            switch (field)
            {
                case byte b: bytes.Add(b); break;
                case ushort s: bytes.AddRange(BitConverter.GetBytes(s)); break;
                case uint u: bytes.AddRange(BitConverter.GetBytes(u)); break;
                case int i: bytes.AddRange(BitConverter.GetBytes(i)); break;
                case ulong l: bytes.AddRange(BitConverter.GetBytes(l)); break;
                case byte[] many: bytes.AddRange(many); break;
                default: throw new ArgumentException($"{field.GetType()}");
            }
        }
        return [.. bytes];
    }

    internal void SendRaw(ReadOnlySpan<byte> bytes, params SafeHandle[] fds) => _socket.Send(bytes, fds);

    internal ushort Send(VfioUserCommand command, ReadOnlySpan<byte> payload, OwnedFd[]? fds = null, uint flags = 0, ushort? id = null)
    {
        ushort use = id ?? _id++;
        byte[] message = new byte[VfioUserHeader.Length + payload.Length];
        new VfioUserHeader(use, command, (uint)message.Length, flags, Errno.None).Write(message);
        payload.CopyTo(message.AsSpan(VfioUserHeader.Length));
        _socket.Send(message, fds ?? []);
        return use;
    }

    internal VfioUserReply Receive() => ReceiveOrEnd() ?? throw new AssertionException("the server closed the connection");

    /// <summary>Receives the next message; null when the server has closed the connection.</summary>
    internal VfioUserReply? ReceiveOrEnd()
    {
        Assert.That(Posix.Poll(socket, Posix.POLLIN, null, (int)s_deadline.TotalMilliseconds, out _), Is.Not.Zero, "the server did not answer in time");
        var fds = new List<OwnedFd>();
        if (_socket.ReceiveHeader(fds) is not { } header) return null;
        byte[] body = new byte[header.SizeBytes - VfioUserHeader.Length];
        _socket.ReceiveBody(body);
        return new VfioUserReply(header, body, fds);
    }

    /// <summary>Receives as many bytes as the span holds, without decoding them.</summary>
    internal void ReceiveRaw(Span<byte> into) => _socket.ReceiveBody(into);

    internal bool HasNothingToRead => Posix.Poll(socket, Posix.POLLIN, null, 0, out _) == 0;

    /// <summary>Sends a request, receives the reply, and checks what holds for every reply.</summary>
    internal VfioUserReply Ask(VfioUserCommand command, ReadOnlySpan<byte> payload, params OwnedFd[] fds)
    {
        ushort id = Send(command, payload, fds);
        VfioUserReply reply = Receive();
        Assert.That((reply.Header.Id, reply.Header.Command, reply.Header.IsReply), Is.EqualTo((id, command, true)));
        if (reply.Header.IsError) Assert.That(reply.Payload, Is.Empty, "an error reply has a header only");
        return reply;
    }

    /// <summary>Sends a request and expects success.</summary>
    internal byte[] Ok(VfioUserCommand command, ReadOnlySpan<byte> payload, params OwnedFd[] fds)
    {
        using VfioUserReply reply = Ask(command, payload, fds);
        Assert.That(reply.Header.Errno, Is.EqualTo(Errno.None), command.ToString());
        Assert.That(reply.Header.Flags, Is.EqualTo(VfioUserHeader.Reply));
        return reply.Payload;
    }

    /// <summary>Sends a request and expects an error reply with this errno.</summary>
    internal void Fails(Errno errno, VfioUserCommand command, ReadOnlySpan<byte> payload, params OwnedFd[] fds)
    {
        using VfioUserReply reply = Ask(command, payload, fds);
        Assert.That((reply.Header.Errno, reply.Header.Flags), Is.EqualTo((errno, VfioUserHeader.Reply | VfioUserHeader.Error)), $"{command} {Convert.ToHexString(payload)}");
    }

    internal void Invalid(VfioUserCommand command, params object[] fields) => Fails(Errno.EINVAL, command, Bytes(fields));

    internal static byte[] Version(string? json, ushort minor = 2, ushort major = 0) => Bytes(major, minor, json is null ? [] : Encoding.UTF8.GetBytes(json + "\0"));

    internal byte[] Negotiate(string? json = Json, ushort minor = 2) => Ok(VfioUserCommand.Version, Version(json, minor));

    internal byte[] RegionRead(uint region, ulong offset, int count)
    {
        byte[] reply = Ok(VfioUserCommand.RegionRead, Bytes(offset, region, count));
        Assert.That(reply.AsSpan(0, 16).SequenceEqual(Bytes(offset, region, count)));
        return reply[16..];
    }

    internal uint Read32(uint region, ulong offset) => BinaryPrimitives.ReadUInt32LittleEndian(RegionRead(region, offset, 4));

    internal ulong Read64(uint region, ulong offset) => BinaryPrimitives.ReadUInt64LittleEndian(RegionRead(region, offset, 8));

    internal void RegionWrite(uint region, ulong offset, params object[] data)
    {
        byte[] bytes = Bytes(data);
        byte[] head = Bytes(offset, region, bytes.Length);
        Assert.That(Ok(VfioUserCommand.RegionWrite, Bytes(head, bytes)), Is.EqualTo(head));
    }

    internal void Map(ulong address, ulong size, OwnedFd? fd, ulong fileOffset = 0, uint flags = 3) =>
        Ok(VfioUserCommand.DmaMap, MapRequest(address, size, fileOffset, flags), fd is null ? [] : [fd]);

    internal static byte[] MapRequest(ulong address, ulong size, ulong fileOffset = 0, uint flags = 3) => Bytes(32, flags, fileOffset, address, size);

    internal static byte[] UnmapRequest(ulong address, ulong size, uint flags = 0) => Bytes(24, flags, address, size);

    internal void SetState(VfioDeviceState state)
    {
        byte[] request = StateRequest(state);
        Assert.That(Ok(VfioUserCommand.DeviceFeature, request), Is.EqualTo(request));
    }

    internal static byte[] StateRequest(VfioDeviceState state) => Bytes(16, 0x20002, (uint)state, uint.MaxValue);

    internal VfioDeviceState State => (VfioDeviceState)BinaryPrimitives.ReadUInt32LittleEndian(Ok(VfioUserCommand.DeviceFeature, Bytes(16, 0x10002)).AsSpan(8));

    internal byte[] MigRead(int size)
    {
        byte[] reply = Ok(VfioUserCommand.MigDataRead, Bytes(8 + size, size));
        Assert.That(reply, Has.Length.EqualTo(8 + size), "the reply has the requested size");
        int n = BinaryPrimitives.ReadInt32LittleEndian(reply.AsSpan(4));
        Assert.That(BinaryPrimitives.ReadInt32LittleEndian(reply), Is.EqualTo(8 + n));
        Assert.That(reply.AsSpan(8 + n).IndexOfAnyExcept((byte)0), Is.EqualTo(-1), "padding is zero");
        return reply[8..(8 + n)];
    }

    /// <summary>Reads until a read returns no data (vfio-user C-10).</summary>
    internal byte[] MigReadAll(int size = 4096)
    {
        var all = new List<byte>();
        for (byte[] part = MigRead(size); part.Length > 0; part = MigRead(size)) all.AddRange(part);
        return [.. all];
    }

    internal void MigWrite(ReadOnlySpan<byte> data) => Assert.That(Ok(VfioUserCommand.MigDataWrite, Bytes(8 + data.Length, data.Length, data.ToArray())), Is.Empty);

    internal void StartLog(ulong pageSize = 4096) => Ok(VfioUserCommand.DeviceFeature, Bytes(24, 0x20006, pageSize, 0, 0));

    internal static byte[] ReportRequest(ulong iova, ulong length, ulong pageSize, uint? argsz = null)
    {
        uint bytes = (uint)VfioUserBitmap.BytesFor(length, pageSize);
        return Bytes(argsz ?? (32 + bytes), 0x10008, iova, length, pageSize);
    }

    /// <summary>Reads the dirty log of a range and returns the indices of its dirty pages.</summary>
    internal int[] Report(ulong iova, ulong length, ulong pageSize = 4096)
    {
        byte[] request = ReportRequest(iova, length, pageSize);
        byte[] reply = Ok(VfioUserCommand.DeviceFeature, request);
        Assert.That(reply.AsSpan(0, 32).SequenceEqual(request));
        return [.. Enumerable.Range(0, (reply.Length - 32) * 8).Where(i => (reply[32 + (i / 8)] & (1 << (i % 8))) != 0)];
    }

    internal void SetIrqs(uint flags, uint index, uint start, uint count, params OwnedFd[] fds) =>
        Assert.That(Ok(VfioUserCommand.DeviceSetIrqs, Bytes(20, flags, index, start, count), fds), Is.Empty);

    internal static bool IsSignalled(OwnedFd eventFd)
    {
        bool signalled = Posix.Poll(eventFd, Posix.POLLIN, null, 0, out _) != 0;
        if (signalled) Posix.DrainEventFd(eventFd);
        return signalled;
    }

    internal static void WaitSignalled(OwnedFd eventFd)
    {
        Assert.That(Posix.Poll(eventFd, Posix.POLLIN, null, (int)s_deadline.TotalMilliseconds, out _), Is.Not.Zero, "the interrupt did not come in time");
        Posix.DrainEventFd(eventFd);
    }

    internal void HangUp() => _socket.Shutdown();

    public void Dispose()
    {
        if (!socket.IsClosed) _socket.Shutdown();
        _socket.Dispose();
    }
}
