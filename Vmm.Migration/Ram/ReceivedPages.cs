using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>
/// Which pages a load has received. A source sends every page of every block at least once, zero or not, so a page that never came was lost:
/// on a channel that nobody read, or in a stream that nobody understood. Any thread may note pages.
/// </summary>
internal sealed class ReceivedPages
{
    private readonly Dictionary<RamBlock, DirtyBitmap> _received;
    private readonly HashSet<RamBlock> _expected = [];

    /// <summary>Begins a load: nothing has come, nothing is expected yet.</summary>
    internal ReceivedPages(IReadOnlyList<RamBlock> blocks) => _received = blocks.ToDictionary(static b => b, static b => new DirtyBitmap(b.PageCount));

    /// <summary>The source has listed a block whose pages it sends.</summary>
    internal void Expect(RamBlock block) => _expected.Add(block);

    /// <summary>The pages of a block; a caller that loads many keeps it.</summary>
    internal DirtyBitmap Of(RamBlock block) => _received[block];

    /// <summary>Call before the load is confirmed.</summary>
    /// <exception cref="IncompatibleStateException">Pages are missing; names the first block and how many.</exception>
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
