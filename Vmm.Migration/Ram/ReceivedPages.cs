using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>
/// The pages that a load has received. A source sends every page of every block at least once, even a zero page, so a page that never came was lost, e.g. on
/// a channel that nobody reads. Any thread may note pages.
/// </summary>
internal sealed class ReceivedPages
{
    private readonly Dictionary<RamBlock, DirtyBitmap> _received;
    private readonly HashSet<RamBlock> _expected = [];

    /// <summary>Begins a load; no page has come, and none is expected yet.</summary>
    internal ReceivedPages(IReadOnlyList<RamBlock> blocks) => _received = blocks.ToDictionary(static b => b, static b => new DirtyBitmap(b.PageCount));

    /// <summary>Notes that the source sends all pages of a block.</summary>
    internal void Expect(RamBlock block) => _expected.Add(block);

    /// <summary>The received pages of a block; a caller that loads many pages keeps the result.</summary>
    internal DirtyBitmap Of(RamBlock block) => _received[block];

    /// <summary>Checks before the confirmation that every expected page has come.</summary>
    /// <exception cref="IncompatibleStateException">Pages are missing; names one block and how many.</exception>
    internal void ThrowIfMissing()
    {
        foreach (RamBlock block in _expected)
        {
            long received = _received[block].Count();
            if (received == block.PageCount) continue;
            throw new IncompatibleStateException($"RAM block '{block.Name}': {block.PageCount - received} of {block.PageCount} pages never came")
            {
                Section = RamConstants.IdStr, Expected = $"{block.PageCount} pages", Found = $"{received} pages",
                Hint = "switch capability multifd on or off on both sides",
            };
        }
    }
}
