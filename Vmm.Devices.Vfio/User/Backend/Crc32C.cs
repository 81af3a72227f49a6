using System.Buffers.Binary;
using System.Numerics;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// CRC-32C (Castagnoli). Long input is computed in three interleaved lanes, because the processor's instruction has a latency of three cycles. To
/// join two lanes, a table advances the first lane's state over as many zero bytes as the second lane is long. Stateless, thread-safe.
/// </summary>
public static class Crc32C
{
    /// <summary>State before the first byte.</summary>
    public const uint Initial = uint.MaxValue;

    private const int LaneBytes = 4096;
    private static readonly uint[] s_zeros = ZerosMap();

    /// <summary>Adds bytes to a checksum.</summary>
    /// <param name="state"><see cref="Initial"/>, or the result for the bytes before.</param>
    /// <param name="bytes">The next bytes.</param>
    /// <returns>The state; its complement is the checksum.</returns>
    public static uint Append(uint state, ReadOnlySpan<byte> bytes)
    {
        for (; bytes.Length >= 3 * LaneBytes; bytes = bytes[(3 * LaneBytes)..])
        {
            ReadOnlySpan<byte> first = bytes[..LaneBytes], second = bytes.Slice(LaneBytes, LaneBytes), third = bytes.Slice(2 * LaneBytes, LaneBytes);
            uint b = 0, c = 0;
            for (int at = 0; at < LaneBytes; at += 8)
            {
                state = BitOperations.Crc32C(state, BinaryPrimitives.ReadUInt64LittleEndian(first[at..]));
                b = BitOperations.Crc32C(b, BinaryPrimitives.ReadUInt64LittleEndian(second[at..]));
                c = BitOperations.Crc32C(c, BinaryPrimitives.ReadUInt64LittleEndian(third[at..]));
            }
            state = AfterZeros(AfterZeros(state) ^ b) ^ c;
        }
        for (; bytes.Length >= 8; bytes = bytes[8..]) state = BitOperations.Crc32C(state, BinaryPrimitives.ReadUInt64LittleEndian(bytes));
        foreach (byte one in bytes) state = BitOperations.Crc32C(state, one);
        return state;
    }

    private static uint AfterZeros(uint state) =>
        s_zeros[state & 0xff] ^ s_zeros[256 + ((state >> 8) & 0xff)] ^ s_zeros[512 + ((state >> 16) & 0xff)] ^ s_zeros[768 + (state >> 24)];

    /// <summary>The state after a lane of zero bytes, for each value of each byte of the state; these add up by xor, because the CRC is linear.</summary>
    private static uint[] ZerosMap()
    {
        uint[] map = new uint[4 * 256];
        for (int bit = 0; bit < 32; bit++)
        {
            uint state = 1u << bit;
            for (int at = 0; at < LaneBytes; at += 8) state = BitOperations.Crc32C(state, 0UL);
            for (int value = 0; value < 256; value++)
                if ((value & (1 << (bit % 8))) != 0) map[(bit / 8 * 256) + value] ^= state;
        }
        return map;
    }
}
