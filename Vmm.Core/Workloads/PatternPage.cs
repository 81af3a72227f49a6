using System.Buffers.Binary;
using System.Runtime.Intrinsics;
using Vmm.Core.Memory;

namespace Vmm.Core.Workloads;

/// <summary>
/// Content of one page as a function of seed, block, page index and generation, so that each page can be checked alone: u64 magic, u64 block hash, u64
/// page index, u64 generation, then 508 words of an arithmetic progression whose start depends on all of these. Two generations differ in every word,
/// so a mixture of them is found. Words are little-endian, like the guest's.
/// </summary>
internal static class PatternPage
{
    internal const int SizeBytes = RamBlock.PageSize;

    private const ulong Magic = 0x4e52_4554_5441_5031; // "1PATTERN" in memory
    private const ulong Step = 0x9e37_79b9_7f4a_7c15;

    /// <summary>Hashes the name of a block (FNV-1a, then <see cref="Mix"/>).</summary>
    internal static ulong HashOf(string block)
    {
        ulong hash = 0xcbf2_9ce4_8422_2325;
        foreach (char c in block) hash = (hash ^ c) * 0x0000_0100_0000_01b3;
        return Mix(hash);
    }

    /// <summary>A bijection in which every input bit affects all output bits (the finalizer of SplitMix64).</summary>
    internal static ulong Mix(ulong x)
    {
        x = (x ^ (x >> 30)) * 0xbf58_476d_1ce4_e5b9;
        x = (x ^ (x >> 27)) * 0x94d0_49bb_1331_11eb;
        return x ^ (x >> 31);
    }

    /// <summary>The contribution of one page to the checksum over all generations of a block.</summary>
    internal static ulong Checksum(long page, uint generation) => generation == 0 ? 0 : Mix(((ulong)page << 32) + generation);

    internal static void Fill(Span<byte> bytes, ulong seed, ulong blockHash, long page, uint generation)
    {
        Vector256<ulong> words = First(seed, blockHash, page, generation);
        Vector256<ulong> step = Vector256.Create(unchecked(4 * Step));
        Vector256.Create(Magic, blockHash, (ulong)page, generation).AsByte().CopyTo(bytes);
        for (int at = 32; at < SizeBytes; at += 32)
        {
            words.AsByte().CopyTo(bytes[at..]);
            words += step;
        }
    }

    internal static bool Matches(ReadOnlySpan<byte> bytes, ulong seed, ulong blockHash, long page, uint generation)
    {
        Vector256<ulong> words = First(seed, blockHash, page, generation);
        Vector256<ulong> step = Vector256.Create(unchecked(4 * Step));
        Vector256<byte> different = Vector256.Create(Magic, blockHash, (ulong)page, generation).AsByte() ^ Vector256.Create(bytes);
        for (int at = 32; at < SizeBytes; at += 32)
        {
            different |= words.AsByte() ^ Vector256.Create(bytes[at..]);
            words += step;
        }
        return different == Vector256<byte>.Zero;
    }

    /// <summary>Describes in words the content of a page that should hold <paramref name="generation"/>.</summary>
    internal static string Describe(ReadOnlySpan<byte> bytes, ulong seed, ulong blockHash, long page, uint generation)
    {
        ulong magic = Word(bytes, 0), hash = Word(bytes, 8), index = Word(bytes, 16), header = Word(bytes, 24);
        if (bytes.IndexOfAnyExcept((byte)0) < 0) return "a zero page";
        if (magic != Magic) return $"no pattern, it starts with 0x{magic:x16}";
        if (hash != blockHash) return "a page of another block";
        if (index != (ulong)page) return $"page {index} of this block";
        if (header > uint.MaxValue) return $"impossible generation {header}";
        uint found = (uint)header;
        if (found != generation && Matches(bytes, seed, blockHash, page, found)) return $"generation {found}, whole";
        for (int at = 32; at < SizeBytes; at += 8)
        {
            ulong word = Word(bytes, at);
            if (word == Expected(at, found)) continue;
            foreach (uint other in (uint[])[generation, found - 1, found + 1])
                if (other != found && word == Expected(at, other)) return $"a torn page: generation {found} up to byte {at}, then generation {other}";
            return $"generation {found} with wrong bytes from byte {at} on: 0x{word:x16} instead of 0x{Expected(at, found):x16}";
        }
        return $"generation {found}";

        ulong Expected(int at, uint g) => First(seed, blockHash, page, g)[0] + ((ulong)((at / 8) - 4) * Step);
    }

    private static ulong Word(ReadOnlySpan<byte> bytes, int at) => BinaryPrimitives.ReadUInt64LittleEndian(bytes[at..]);

    /// <summary>Returns words 4 to 7; word i is start + (i - 4) x step.</summary>
    private static Vector256<ulong> First(ulong seed, ulong blockHash, long page, uint generation)
    {
        ulong start = Mix(Mix(Mix(seed ^ blockHash) ^ (ulong)page) ^ generation);
        return Vector256.Create(start, start + Step, start + unchecked(2 * Step), start + unchecked(3 * Step));
    }
}
