using System.Buffers.Binary;

namespace Vmm.Core.Wire;

/// <summary>Result of a read.</summary>
internal enum WireStatus
{
    /// <summary>The read succeeded.</summary>
    Ok,
    /// <summary>The bytes end inside the value.</summary>
    Truncated,
}

/// <summary>Reads big-endian values from a span. A failed read does not change the position.</summary>
internal ref struct WireReader(ReadOnlySpan<byte> bytes)
{
    private readonly ReadOnlySpan<byte> _bytes = bytes;

    /// <summary>Number of bytes consumed.</summary>
    public int Position { get; private set; }

    /// <summary>Number of bytes left.</summary>
    public readonly int Remaining => _bytes.Length - Position;

    /// <summary>Reads one byte.</summary>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadByte(out byte value)
    {
        value = 0;
        if (Remaining < 1) return WireStatus.Truncated;
        value = _bytes[Position++];
        return WireStatus.Ok;
    }

    /// <summary>Reads a u32.</summary>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadUInt32(out uint value)
    {
        if (!BinaryPrimitives.TryReadUInt32BigEndian(_bytes[Position..], out value)) return WireStatus.Truncated;
        Position += 4;
        return WireStatus.Ok;
    }

    /// <summary>Takes <paramref name="count"/> bytes; <paramref name="value"/> is a view of them, not a copy.</summary>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadBytes(int count, out ReadOnlySpan<byte> value)
    {
        value = default;
        if (count < 0 || Remaining < count) return WireStatus.Truncated;
        value = _bytes.Slice(Position, count);
        Position += count;
        return WireStatus.Ok;
    }
}
