using System.Buffers.Binary;
using Vmm.Core.Memory;

namespace Vmm.Core.Workloads;

/// <summary>
/// The root of the workload's data in a block, at the start of the block's last page. Nine little-endian u64: magic, block hash, seed, flags, data
/// pages, writes, skips, checksum over all generations, checksum over these eight.
/// </summary>
internal struct PatternRoot
{
    private const ulong Magic = 0x3154_4f4f_524d_4d56; // "VMMROOT1" in memory
    private const int Words = 9;

    internal const int SizeBytes = Words * 8, DataPagesWord = 4, WritesWord = 5;

    internal ulong Seed;

    /// <summary>True if memory was zero when the workload started, so that a page of generation 0 must be zero.</summary>
    internal bool WasZero;

    /// <summary>True if the first pass writes all pages in order and at full speed.</summary>
    internal bool Prefill;

    internal long DataPages;

    /// <summary>Number of page writes; equals the sum of all generations.</summary>
    internal long Writes;

    /// <summary>Number of writes that were skipped because the page was wrong.</summary>
    internal long Skips;

    /// <summary>Sum of <see cref="PatternPage.Checksum"/> over all pages.</summary>
    internal ulong Generations;

    internal static bool TryRead(RamBlock block, ulong hash, out PatternRoot root)
    {
        root = default;
        Span<ulong> words = stackalloc ulong[Words];
        ReadOnlySpan<byte> bytes = block.ReadOnlySlice(block.SizeBytes - RamBlock.PageSize, SizeBytes);
        for (int i = 0; i < Words; i++) words[i] = BinaryPrimitives.ReadUInt64LittleEndian(bytes[(i * 8)..]);
        if (words[0] != Magic || words[1] != hash || words[8] != Sum(words)) return false;
        root = new PatternRoot
        {
            Seed = words[2], WasZero = (words[3] & 1) != 0, Prefill = (words[3] & 2) != 0, DataPages = (long)words[DataPagesWord], Writes = (long)words[WritesWord],
            Skips = (long)words[6], Generations = words[7],
        };
        return root.DataPages == PatternBlock.DataPagesOf(block);
    }

    internal readonly void Write(RamBlock block, ulong hash)
    {
        Span<ulong> words =
        [
            Magic, hash, Seed, (WasZero ? 1UL : 0) | (Prefill ? 2UL : 0), (ulong)DataPages, (ulong)Writes, (ulong)Skips, Generations, 0,
        ];
        words[8] = Sum(words);
        ulong at = block.SizeBytes - RamBlock.PageSize;
        Span<byte> bytes = block.Slice(at, SizeBytes);
        for (int i = 0; i < Words; i++) BinaryPrimitives.WriteUInt64LittleEndian(bytes[(i * 8)..], words[i]);
        block.MarkDirty(at, SizeBytes);
    }

    private static ulong Sum(ReadOnlySpan<ulong> words)
    {
        ulong sum = 0;
        for (int i = 0; i < Words - 1; i++) sum = PatternPage.Mix(sum ^ words[i]);
        return sum;
    }
}
