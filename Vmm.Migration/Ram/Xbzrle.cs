namespace Vmm.Migration.Ram;

/// <summary>The delta code of XBZRLE records (stream 3.4): runs of unchanged bytes and of new bytes, lengths as ULEB of at most 14 bits.</summary>
internal static class Xbzrle
{
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
}
