using System.Buffers.Binary;

namespace Vmm.Tools.Devices;

/// <summary>
/// The blocks that the DMA engine of <see cref="DmaTestDevice"/> writes: block n starts with the number n; every further 8 bytes depend on n and on
/// their position. Block n goes to slot n modulo the number of slots, so memory shows which blocks arrived.
/// </summary>
public static class DmaTestPattern
{
    public static void Fill(ulong sequence, Span<byte> block)
    {
        BinaryPrimitives.WriteUInt64LittleEndian(block, sequence);
        for (int at = 8; at + 8 <= block.Length; at += 8) BinaryPrimitives.WriteUInt64LittleEndian(block[at..], Mix(sequence + ((ulong)at << 40)));
    }

    /// <summary>Returns the number of the last block before <paramref name="next"/> that went to a slot; -1 for none.</summary>
    public static long LastOf(ulong slot, ulong slots, ulong next)
    {
        if (next <= slot) return -1;
        return (long)(slot + ((next - 1 - slot) / slots * slots));
    }

    /// <summary>The final mixing step of SplitMix64.</summary>
    public static ulong Mix(ulong x)
    {
        x += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }
}
