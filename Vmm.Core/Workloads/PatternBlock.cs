using System.Buffers.Binary;
using Vmm.Core.Memory;

namespace Vmm.Core.Workloads;

/// <summary>
/// The workload's data in one RAM block: data pages; then index pages (u32 magic, u32 number, 1022 u32 generations, one for each data page in order);
/// in the last page the <see cref="PatternRoot"/>. All of it is guest RAM and migrates as such. The parts check each other: a lost data page is older
/// than its index entry, a lost index page is older than its data pages, and if both are lost, the root's sums do not match. If all three are lost, the
/// section that <c>state=on</c> adds does not match. One thread at a time.
/// </summary>
internal sealed class PatternBlock(RamBlock block)
{
    internal const int MinimumPages = 3;

    private const int EntriesPerPage = (PatternPage.SizeBytes - 8) / 4;
    private const uint IndexMagic = 0x5844_4e49; // "INDX" in memory

    private readonly ulong _hash = PatternPage.HashOf(block.Name);
    private PatternRoot _root;

    internal string Name => block.Name;

    internal long PageCount => block.PageCount;

    internal long DataPages { get; } = DataPagesOf(block);

    /// <summary>Number of pages that the workload writes, from the first page on.</summary>
    internal long WorkPages { get; private set; }

    internal ref readonly PatternRoot Root => ref _root;

    /// <summary>True if the block has a root; without one the workload must not write.</summary>
    internal bool IsAttached { get; private set; }

    private long IndexPages => block.PageCount - 1 - DataPages;

    internal static long DataPagesOf(RamBlock block)
    {
        long rest = block.PageCount - 1;
        return rest - ((rest + EntriesPerPage) / (EntriesPerPage + 1));
    }

    internal long SetWorkingSet(ulong percent) => WorkPages = Math.Max(1, (long)((ulong)DataPages * percent / 100));

    /// <summary>Reads the root from RAM, to continue from there.</summary>
    /// <returns>False if RAM holds no root.</returns>
    internal bool TryAttach() => IsAttached = PatternRoot.TryRead(block, _hash, out _root);

    /// <summary>Writes root and index into RAM that no workload has used.</summary>
    internal void Format(ulong seed, bool prefill)
    {
        _root = new PatternRoot { Seed = seed, Prefill = prefill, WasZero = block.IsKnownZero, DataPages = DataPages };
        for (long i = 0; i < IndexPages; i++)
        {
            Span<byte> page = PageForWrite(DataPages + i);
            page.Clear();
            BinaryPrimitives.WriteUInt32LittleEndian(page, IndexMagic);
            BinaryPrimitives.WriteUInt32LittleEndian(page[4..], (uint)i);
            MarkDirty(DataPages + i);
        }
        _root.Write(block, _hash);
        IsAttached = true;
    }

    /// <summary>True if RAM holds an index page; a block with an index page and no root has lost its root.</summary>
    internal bool HasIndex() => HasIndexMagic(0);

    /// <summary>Checks a page and writes its next generation. A wrong page stays as it is, so that a scan finds it too.</summary>
    /// <returns>The violation, or null.</returns>
    internal WorkloadViolation? Rewrite(long page)
    {
        uint generation = Generation(page);
        if (Check(page, generation) is { } violation)
        {
            _root.Skips++;
            _root.Write(block, _hash);
            return violation;
        }
        uint next = generation + 1;
        PatternPage.Fill(PageForWrite(page), _root.Seed, _hash, page, next);
        MarkDirty(page);
        ulong entry = EntryOffset(page);
        BinaryPrimitives.WriteUInt32LittleEndian(block.Slice(entry, 4), next);
        block.MarkDirty(entry, 4);
        _root.Writes++;
        _root.Generations += PatternPage.Checksum(page, next) - PatternPage.Checksum(page, generation);
        _root.Write(block, _hash);
        return null;
    }

    /// <summary>Checks one data page against its index entry.</summary>
    internal WorkloadViolation? Check(long page) => Check(page, Generation(page));

    /// <summary>Checks the index pages against the root, and adds the number of wrong ones to <paramref name="bad"/>.</summary>
    internal WorkloadViolation? CheckIndex(ref long bad)
    {
        WorkloadViolation? violation = null;
        for (long i = 0; i < IndexPages; i++)
        {
            if (HasIndexMagic(i)) continue;
            bad++;
            violation ??= new WorkloadViolation(Name, DataPages + i, $"index page {i} of the workload", "something else");
        }
        if (violation is not null) return violation;
        long writes = 0;
        ulong generations = 0;
        for (long first = 0; first < DataPages; first += EntriesPerPage)
        {
            int count = (int)Math.Min(EntriesPerPage, DataPages - first);
            ReadOnlySpan<byte> entries = block.ReadOnlySlice(EntryOffset(first), count * 4);
            for (int i = 0; i < count; i++)
            {
                uint generation = BinaryPrimitives.ReadUInt32LittleEndian(entries[(i * 4)..]);
                writes += generation;
                generations += PatternPage.Checksum(first + i, generation);
            }
        }
        if (writes == _root.Writes && generations == _root.Generations) return null;
        bad++;
        return new WorkloadViolation(Name, block.PageCount - 1, $"{_root.Writes} writes with checksum 0x{_root.Generations:x16} as in the root",
            $"{writes} writes with checksum 0x{generations:x16} in the index");
    }

    /// <summary>Makes the violation of RAM that must hold a workload and has no root.</summary>
    internal WorkloadViolation LostRoot() => LostRoot(HasIndex() ? "none, though its index is there" : "none, and no index: the whole block was lost, or no workload ever ran on it");

    internal WorkloadViolation LostRoot(string found) => new(Name, block.PageCount - 1, "the workload's root", found);

    private WorkloadViolation? Check(long page, uint generation)
    {
        ReadOnlySpan<byte> bytes = block.ReadOnlySlice((ulong)page * PatternPage.SizeBytes, PatternPage.SizeBytes);
        if (generation == 0)
        {
            // The content of an unwritten page is known only if the memory was zero at the start.
            if (!_root.WasZero || block.IsZeroPage(page)) return null;
            return new WorkloadViolation(Name, page, "a zero page, never written", PatternPage.Describe(bytes, _root.Seed, _hash, page, generation));
        }
        if (PatternPage.Matches(bytes, _root.Seed, _hash, page, generation)) return null;
        return new WorkloadViolation(Name, page, $"generation {generation}", PatternPage.Describe(bytes, _root.Seed, _hash, page, generation));
    }

    private uint Generation(long page) => BinaryPrimitives.ReadUInt32LittleEndian(block.ReadOnlySlice(EntryOffset(page), 4));

    private bool HasIndexMagic(long index)
    {
        ReadOnlySpan<byte> head = block.ReadOnlySlice((ulong)(DataPages + index) * PatternPage.SizeBytes, 8);
        return BinaryPrimitives.ReadUInt32LittleEndian(head) == IndexMagic && BinaryPrimitives.ReadUInt32LittleEndian(head[4..]) == (uint)index;
    }

    private ulong EntryOffset(long page) =>
        ((ulong)(DataPages + (page / EntriesPerPage)) * PatternPage.SizeBytes) + 8 + ((ulong)(page % EntriesPerPage) * 4);

    private Span<byte> PageForWrite(long page) => block.Slice((ulong)page * PatternPage.SizeBytes, PatternPage.SizeBytes);

    private void MarkDirty(long page) => block.MarkDirty((ulong)page * PatternPage.SizeBytes, PatternPage.SizeBytes);
}
