using System.Numerics;
using System.Runtime.Intrinsics;

namespace Vmm.Migration.Ram;

/// <summary>The delta code of XBZRLE records (stream 3.4): runs of unchanged bytes and of new bytes, lengths as ULEB of at most 14 bits.</summary>
internal static class Xbzrle
{
    private const int VectorBytes = 64;

    /// <summary>Makes the delta that turns one content of a page into another (QEMU: <c>xbzrle_encode_buffer</c>).</summary>
    /// <param name="old">The content that the destination has; whole pages.</param>
    /// <param name="now">The content that it shall have; as long, and nobody may write it meanwhile.</param>
    /// <param name="delta">Receives the delta.</param>
    /// <returns>Bytes of the delta; 0 when nothing changed, -1 when it has no room.</returns>
    public static int Encode(ReadOnlySpan<byte> old, ReadOnlySpan<byte> now, Span<byte> delta)
    {
        Span<ulong> changed = stackalloc ulong[now.Length / VectorBytes];
        if (!FindChanges(old, now, changed)) return 0;
        JoinRuns(changed);
        int used = 0;
        for (int at = 0; Next(changed, at, 0) is var from && from < now.Length;)
        {
            int end = Next(changed, from, ulong.MaxValue);
            int count = end - from;
            if (UlebBytes(from - at) + UlebBytes(count) + count > delta.Length - used) return -1;
            WriteUleb(delta, ref used, from - at);
            WriteUleb(delta, ref used, count);
            now[from..end].CopyTo(delta[used..]);
            used += count;
            at = end;
        }
        return used;
    }

    /// <summary>Applies a delta to a page.</summary>
    /// <param name="delta">1*( uleb unchanged, uleb count, bytes ).</param>
    /// <param name="page">The page, changed in place; partly changed when the delta is bad.</param>
    /// <returns>False for a delta that is cut off, has an empty run, or reaches beyond the page.</returns>
    public static bool TryDecode(ReadOnlySpan<byte> delta, Span<byte> page)
    {
        int at = 0, to = 0;
        while (at < delta.Length)
        {
            if (delta.Length - at < 2 || !TryReadUleb(delta, ref at, out int skip)) return false;
            if (skip == 0 && to != 0) return false;
            to += skip;
            if (to > page.Length || delta.Length - at < 2 || !TryReadUleb(delta, ref at, out int count)) return false;
            if (count == 0 || count > delta.Length - at || count > page.Length - to) return false;
            delta.Slice(at, count).CopyTo(page[to..]);
            at += count;
            to += count;
        }
        return true;
    }

    private static bool TryReadUleb(ReadOnlySpan<byte> bytes, ref int at, out int value)
    {
        value = 0;
        if (at >= bytes.Length) return false;
        value = bytes[at++];
        if (value < 0x80) return true;
        if (at >= bytes.Length || bytes[at] >= 0x80) return false;
        value = (value & 0x7f) | (bytes[at++] << 7);
        return true;
    }

    /// <summary>Sets one bit for each byte that differs, the lowest bit first.</summary>
    /// <returns>False if none does.</returns>
    private static bool FindChanges(ReadOnlySpan<byte> old, ReadOnlySpan<byte> now, Span<ulong> changed)
    {
        ulong any = 0;
        for (int i = 0; i < changed.Length; i++)
        {
            Vector512<byte> before = Vector512.Create(old.Slice(i * VectorBytes, VectorBytes)), after = Vector512.Create(now.Slice(i * VectorBytes, VectorBytes));
            any |= changed[i] = ~Vector512.Equals(before, after).ExtractMostSignificantBits();
        }
        return any != 0;
    }

    /// <summary>Counts a single unchanged byte between two changed ones as changed: the two lengths that it saves are longer than the byte.</summary>
    private static void JoinRuns(Span<ulong> changed)
    {
        ulong before = 0;
        for (int i = 0; i < changed.Length; i++)
        {
            ulong word = changed[i], after = i + 1 < changed.Length ? changed[i + 1] : 0;
            changed[i] = word | (((word << 1) | (before >> 63)) & ((word >> 1) | (after << 63)));
            before = word;
        }
    }

    /// <summary>Finds the next bit from <paramref name="from"/> on that differs from those of <paramref name="flip"/>; the number of bits if there is none.</summary>
    private static int Next(ReadOnlySpan<ulong> bits, int from, ulong flip)
    {
        int word = from >> 6;
        if (word == bits.Length) return from;
        ulong found = (bits[word] ^ flip) & (ulong.MaxValue << from);
        while (found == 0)
        {
            if (++word == bits.Length) return word << 6;
            found = bits[word] ^ flip;
        }
        return (word << 6) + BitOperations.TrailingZeroCount(found);
    }

    private static int UlebBytes(int value) => value < 0x80 ? 1 : 2;

    private static void WriteUleb(Span<byte> bytes, ref int at, int value)
    {
        if (value >= 0x80)
        {
            bytes[at++] = (byte)(value | 0x80);
            value >>= 7;
        }
        bytes[at++] = (byte)value;
    }
}
