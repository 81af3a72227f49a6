using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>The pages of one RAM block that one attempt must still send.</summary>
internal sealed class RamBlockScan(RamBlock block)
{
    private DirtyBitmap? _written;

    internal RamBlock Block { get; } = block;

    internal DirtyBitmap Bitmap { get; } = new(block.PageCount);

    /// <summary>Pages that had no memory when the attempt began and were neither written nor sent since: they are zero without being read.</summary>
    internal DirtyBitmap Holes { get; } = new(block.PageCount);

    /// <summary>Marks all pages; call it when the dirty log runs.</summary>
    internal void MarkAll()
    {
        Bitmap.SetAll();
        Block.FindHoles(Holes);
    }

    /// <summary>
    /// Moves the log's marks into <see cref="Bitmap"/>. A hole that was written meanwhile is no hole any more.
    /// </summary>
    /// <returns>Number of pages to send.</returns>
    internal long Harvest(GuestMemory memory)
    {
        if (Holes.FindNext(0) == Holes.PageCount)
        {
            memory.HarvestDirtyLog(Block, Bitmap);
            return Bitmap.Count();
        }
        _written ??= new DirtyBitmap(Block.PageCount);
        memory.HarvestDirtyLog(Block, _written);
        for (int i = 0; i < _written.WordCount; i++)
        {
            ulong marks = _written.TakeWord(i);
            if (marks == 0) continue;
            Bitmap.OrWord(i, marks);
            Holes.OrWord(i, Holes.TakeWord(i) & ~marks);
        }
        return Bitmap.Count();
    }
}
