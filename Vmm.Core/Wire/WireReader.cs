using System.Buffers.Binary;
using System.Text;

namespace Vmm.Core.Wire;

/// <summary>Outcome of a primitive read.</summary>
public enum WireStatus
{
    /// <summary>The value was read.</summary>
    Ok,
    /// <summary>The bytes end inside the value.</summary>
    Truncated,
}

/// <summary>Reads big-endian values from a span. Never touches a channel; a failed read does not move.</summary>
/// <param name="bytes">The bytes.</param>
public ref struct WireReader(ReadOnlySpan<byte> bytes)
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

    /// <summary>Reads a u16.</summary>
    /// <param name="value">The value.</param>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadUInt16(out ushort value)
    {
        if (!BinaryPrimitives.TryReadUInt16BigEndian(_bytes[Position..], out value)) return WireStatus.Truncated;
        Position += 2;
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

    /// <summary>Reads a u64.</summary>
    /// <param name="value">The value.</param>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadUInt64(out ulong value)
    {
        if (!BinaryPrimitives.TryReadUInt64BigEndian(_bytes[Position..], out value)) return WireStatus.Truncated;
        Position += 8;
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

    /// <summary>Reads a counted string: one length byte, then Latin-1 bytes (spec: <c>cs</c>).</summary>
    /// <param name="value">The text.</param>
    /// <returns>Ok or Truncated.</returns>
    public WireStatus TryReadCountedString(out string value)
    {
        value = string.Empty;
        if (Remaining < 1 || Remaining < 1 + _bytes[Position]) return WireStatus.Truncated;
        int n = _bytes[Position];
        value = Encoding.Latin1.GetString(_bytes.Slice(Position + 1, n));
        Position += 1 + n;
        return WireStatus.Ok;
    }
}
