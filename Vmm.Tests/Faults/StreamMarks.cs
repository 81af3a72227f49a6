using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace Vmm.Tests.Faults;

/// <summary>
/// Finds the places in the two directions of a main channel from which faults count. It reads no RAM records: the guest's pages are pseudo-random, so the few
/// bytes that it looks for do not come up in them by chance. For one thread a direction.
/// </summary>
internal sealed class StreamMarks
{
    /// <summary>Bytes that a reader keeps in front of what it read last, so that a mark may lie across two reads.</summary>
    internal const int Overlap = 16;

    private const int HeadBytes = 6, MaxDescriptionBytes = 1 << 20;

    /// <summary>A FULL section has five bytes before its name.</summary>
    private const int BeforeName = 5;

    private static readonly byte[] s_timer = [5, .. "timer"u8];
    private readonly List<byte> _back = [];
    private int _message;
    private long _devices = -1, _end = -1, _shut = -1, _backBytes;
    private int _shutValue = -1;

    /// <summary>The first section of a device; -1 before it was seen.</summary>
    internal long Devices => Volatile.Read(ref _devices);

    /// <summary>The end of the stream; known before its last bytes pass.</summary>
    internal long End => Volatile.Read(ref _end);

    /// <summary>The first byte of SHUT on the way back.</summary>
    internal long Shut => Volatile.Read(ref _shut);

    /// <summary>The value of SHUT; -1 before all of it has been seen.</summary>
    internal int ShutValue => Volatile.Read(ref _shutValue);

    /// <summary>Bytes of the way back that have come from the destination.</summary>
    internal long BackBytes => Interlocked.Read(ref _backBytes);

    /// <summary>Looks at bytes from the source, before they are sent on.</summary>
    /// <param name="bytes">The bytes, with up to <see cref="Overlap"/> bytes before them.</param>
    /// <param name="at">Position of the first of <paramref name="bytes"/>.</param>
    internal void LookForward(ReadOnlySpan<byte> bytes, long at)
    {
        if (Devices < 0 && bytes.IndexOf(s_timer) is >= 0 and int timer) Volatile.Write(ref _devices, Math.Max(0, at + timer - BeforeName));
        if (End >= 0) return;
        for (int from = 0; bytes[from..].IndexOf("{\""u8) is >= 0 and int brace; from += brace + 1)
        {
            int json = from + brace;
            if (json < HeadBytes || bytes[json - HeadBytes] != 0 || bytes[json - HeadBytes + 1] != 6) continue;
            uint length = BinaryPrimitives.ReadUInt32BigEndian(bytes[(json - 4)..]);
            if (length is 0 or > MaxDescriptionBytes) continue;
            Volatile.Write(ref _end, at + json + length);
            return;
        }
    }

    /// <summary>Looks at bytes from the destination: u16 type, u16 length, payload.</summary>
    internal void LookBack(ReadOnlySpan<byte> bytes)
    {
        Interlocked.Add(ref _backBytes, bytes.Length);
        _back.AddRange(bytes);
        ReadOnlySpan<byte> all = CollectionsMarshal.AsSpan(_back);
        while (all.Length - _message >= 4)
        {
            ReadOnlySpan<byte> message = all[_message..];
            int type = BinaryPrimitives.ReadUInt16BigEndian(message), length = BinaryPrimitives.ReadUInt16BigEndian(message[2..]);
            if (type == 1 && Shut < 0) Volatile.Write(ref _shut, _message);
            if (message.Length < 4 + length) return;
            if (type == 1 && length == 4 && ShutValue < 0) Volatile.Write(ref _shutValue, (int)BinaryPrimitives.ReadUInt32BigEndian(message[4..]));
            _message += 4 + length;
        }
    }
}
