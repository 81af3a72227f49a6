using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// What a server answered while its device was opened. The process that takes the connection over opens the device in the same way and gets
/// the same answers from here, so that the server gets none of these requests: no reset, no write, no second map (vfio-migration 7.6). Recorded
/// by one thread; answered under a lock. Bytes, little-endian: u32 magic, u32 length and bytes of the VERSION reply, u32 count; per answer u16
/// command, u32 errno, u32 length and bytes of the request, the same of the reply, u32 number of descriptors.
/// </summary>
internal sealed class VfioUserTranscript : IDisposable
{
    private const uint Magic = 0x54_52_56_31;
    private readonly Lock _gate = new();
    private readonly List<Answer> _answers = [];
    private readonly Dictionary<string, Queue<Answer>> _left = [];

    /// <summary>Makes an empty one.</summary>
    /// <param name="version">The server's VERSION reply.</param>
    internal VfioUserTranscript(byte[] version) => Version = version;

    /// <summary>The server's VERSION reply.</summary>
    internal byte[] Version { get; }

    /// <summary>Descriptors of the replies, in order; owned.</summary>
    internal IReadOnlyList<OwnedFd> Fds => [.. _answers.SelectMany(static a => a.Fds)];

    /// <summary>Notes an answer.</summary>
    internal void Record(VfioUserCommand command, ReadOnlySpan<byte> request, Errno errno, ReadOnlySpan<byte> reply, IReadOnlyList<OwnedFd> fds)
    {
        lock (_gate) _answers.Add(new Answer(command, request.ToArray(), errno, reply.ToArray(), (OwnedFd[])[.. fds.Select(Posix.Duplicate)]));
    }

    /// <summary>Answers a request as the server did. One that was not recorded gets an answer that changes nothing.</summary>
    internal void Reply(VfioUserExchange exchange, ReadOnlySpan<byte> request)
    {
        Answer? answer = Find(exchange.Command, request);
        if (answer is null)
        {
            (Errno errno, int echo) = exchange.Command switch
            {
                VfioUserCommand.RegionWrite => (Errno.None, Math.Min(request.Length, VfioUserRegionAccess.Length)),
                VfioUserCommand.DmaMap or VfioUserCommand.DmaUnmap or VfioUserCommand.DeviceSetIrqs or VfioUserCommand.DeviceReset or VfioUserCommand.DirtyPages => (Errno.None, 0),
                _ => (Errno.EAGAIN, 0),
            };
            request[..echo].CopyTo(exchange.ReplyBuffer(echo));
            exchange.Complete(errno, echo);
            return;
        }
        answer.Reply.CopyTo(exchange.ReplyBuffer(answer.Reply.Length));
        foreach (OwnedFd fd in answer.Fds.Take(exchange.WantedFds)) exchange.ReplyFds.Add(Posix.Duplicate(fd));
        exchange.Complete(answer.Errno, answer.Reply.Length);
    }

    /// <summary>The bytes; descriptors travel beside them.</summary>
    internal byte[] ToBytes()
    {
        using var stream = new MemoryStream();
        using var w = new BinaryWriter(stream);
        w.Write(Magic);
        Bytes(w, Version);
        w.Write(_answers.Count);
        foreach (Answer a in _answers)
        {
            w.Write((ushort)a.Command);
            w.Write((uint)a.Errno);
            Bytes(w, a.Request);
            Bytes(w, a.Reply);
            w.Write(a.Fds.Count);
        }
        w.Flush();
        return stream.ToArray();
    }

    /// <summary>Reads what <see cref="ToBytes"/> wrote.</summary>
    /// <param name="bytes">The bytes.</param>
    /// <param name="takeFd">Gives the descriptor of a number, which the transcript then owns.</param>
    /// <exception cref="StreamFormatException">Not a transcript.</exception>
    internal static VfioUserTranscript Parse(ReadOnlySpan<byte> bytes, Func<int, OwnedFd> takeFd)
    {
        int at = 0, fds = 0;
        if (U32(bytes, ref at) != Magic) throw Bad(0);
        var transcript = new VfioUserTranscript(Take(bytes, ref at));
        try
        {
            for (uint left = U32(bytes, ref at); left > 0; left--)
            {
                var command = (VfioUserCommand)BinaryPrimitives.ReadUInt16LittleEndian(Take(bytes, ref at, 2));
                var errno = (Errno)U32(bytes, ref at);
                byte[] request = Take(bytes, ref at), reply = Take(bytes, ref at);
                uint count = U32(bytes, ref at);
                if (count > VfioUserLimits.TranscriptFds - fds) throw Bad(at);
                var own = new List<OwnedFd>();
                // Added at once, so that these descriptors are closed when a later one is missing.
                transcript._answers.Add(new Answer(command, request, errno, reply, own));
                for (uint i = 0; i < count; i++) own.Add(takeFd(fds++));
            }
            if (at != bytes.Length) throw Bad(at);
        }
        catch
        {
            transcript.Dispose();
            throw;
        }
        foreach (Answer a in transcript._answers)
        {
            string key = Key(a.Command, a.Request);
            if (!transcript._left.TryGetValue(key, out Queue<Answer>? queue)) transcript._left.Add(key, queue = new());
            queue.Enqueue(a);
        }
        return transcript;
    }

    /// <summary>Closes the descriptors.</summary>
    public void Dispose()
    {
        foreach (OwnedFd fd in Fds) fd.Dispose();
    }

    /// <summary>Adds an answer. The same request may have had several, for example when a register was sized; the last one stays.</summary>
    private Answer? Find(VfioUserCommand command, ReadOnlySpan<byte> request)
    {
        lock (_gate)
        {
            if (!_left.TryGetValue(Key(command, request), out Queue<Answer>? queue)) return null;
            return queue.Count > 1 ? queue.Dequeue() : queue.Peek();
        }
    }

    private static string Key(VfioUserCommand command, ReadOnlySpan<byte> request) => $"{(int)command}:{Convert.ToHexString(request)}";

    private static void Bytes(BinaryWriter w, byte[] bytes)
    {
        w.Write(bytes.Length);
        w.Write(bytes);
    }

    private static uint U32(ReadOnlySpan<byte> bytes, ref int at) => BinaryPrimitives.ReadUInt32LittleEndian(Take(bytes, ref at, 4));

    private static byte[] Take(ReadOnlySpan<byte> bytes, ref int at) => Take(bytes, ref at, U32(bytes, ref at));

    private static byte[] Take(ReadOnlySpan<byte> bytes, ref int at, uint count)
    {
        if (count > bytes.Length - at) throw Bad(at);
        byte[] taken = bytes.Slice(at, (int)count).ToArray();
        at += (int)count;
        return taken;
    }

    private static StreamFormatException Bad(int at) => new($"vfio-user transcript: broken at offset {at}") { Offset = at };

    private sealed record Answer(VfioUserCommand Command, byte[] Request, Errno Errno, byte[] Reply, IReadOnlyList<OwnedFd> Fds);
}
