using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>What one attempt still has to send of one RAM block.</summary>
internal sealed class RamBlockScan(RamBlock block)
{
    private DirtyBitmap? _written;

    internal RamBlock Block { get; } = block;

    internal DirtyBitmap Bitmap { get; } = new(block.PageCount);

    /// <summary>Pages without memory when the attempt began, and neither written nor sent since.</summary>
    internal DirtyBitmap Holes { get; } = new(block.PageCount);

    /// <summary>Everything is to be sent; the dirty log runs already.</summary>
    internal void MarkAll()
    {
        Bitmap.SetAll();
        Block.FindHoles(Holes);
    }

    /// <summary>
    /// Moves the log's marks into <see cref="Bitmap"/>. A page whose first turn is still to come may have been written meanwhile: it is no hole then.
    /// </summary>
    /// <returns>Pages to send.</returns>
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
