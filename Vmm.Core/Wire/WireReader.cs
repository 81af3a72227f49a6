using System.Buffers.Binary;

namespace Vmm.Core.Wire;

/// <summary>Outcome of a primitive read.</summary>
internal enum WireStatus
{
    /// <summary>The value was read.</summary>
    Ok,
    /// <summary>The bytes end inside the value.</summary>
    Truncated,
}

/// <summary>Reads big-endian values from a span. Never touches a channel; a failed read does not move.</summary>
/// <param name="bytes">The bytes.</param>
internal ref struct WireReader(ReadOnlySpan<byte> bytes)
{
    private readonly ReadOnlySpan<byte> _bytes = bytes;

    /// <summary>Bytes consumed.</summary>
    public int Position { get; private set; }

    /// <summary>Bytes left.</summary>
    public readonly int Remaining => _bytes.Length - Position;

    /// <summary>Reads one byte.</summary>
    /// <param name="value">The value.</param>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadByte(out byte value)
    {
        value = 0;
        if (Remaining < 1) return WireStatus.Truncated;
        value = _bytes[Position++];
        return WireStatus.Ok;
    }

    /// <summary>Reads a u32.</summary>
    /// <param name="value">The value.</param>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadUInt32(out uint value)
    {
        if (!BinaryPrimitives.TryReadUInt32BigEndian(_bytes[Position..], out value)) return WireStatus.Truncated;
        Position += 4;
        return WireStatus.Ok;
    }

    /// <summary>Takes a number of bytes.</summary>
    /// <param name="count">How many.</param>
    /// <param name="value">A view of them.</param>
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
