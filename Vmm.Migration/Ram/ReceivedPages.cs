using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>
/// The pages that a load has received. A source sends every page of every block at least once, even a zero page, so a page that never came was lost, e.g. on
/// a channel that nobody reads. Any thread may note pages.
/// </summary>
internal sealed class ReceivedPages
{
    private const string FileHint = "with x-ignore-shared both sides need the same file: --memory SIZE,file=PATH,share=on";

    private readonly Dictionary<RamBlock, DirtyBitmap> _received;
    private readonly HashSet<RamBlock> _expected = [], _inFiles = [];

    /// <summary>Begins a load; no page has come, and none is expected yet.</summary>
    internal ReceivedPages(IReadOnlyList<RamBlock> blocks) => _received = blocks.ToDictionary(static b => b, static b => new DirtyBitmap(b.PageCount));

    /// <summary>Notes that the source sends all pages of a block.</summary>
    internal void Expect(RamBlock block) => _expected.Add(block);

    /// <summary>
    /// Notes that the source may leave a block out, because both sides have its file (x-ignore-shared). Then none of its pages comes. A block that is mapped privately
    /// here can be a copy of a template, or an ordinary one, so all of its pages may come too.
    /// </summary>
    internal void ExpectInFile(RamBlock block) => _inFiles.Add(block);

    /// <summary>The received pages of a block; a caller that loads many pages keeps the result.</summary>
    internal DirtyBitmap Of(RamBlock block) => _received[block];

    /// <summary>Checks before the confirmation that every expected page has come.</summary>
    /// <param name="leavesOut">The source may leave blocks out.</param>
    /// <exception cref="IncompatibleStateException">Pages are missing; names one block and how many.</exception>
    internal void ThrowIfMissing(bool leavesOut)
    {
        foreach (RamBlock block in _expected.Concat(_inFiles))
        {
            long received = _received[block].Count();
            if (received == block.PageCount) continue;
            if (received == 0 && _inFiles.Contains(block))
            {
                ThrowIfNew(block);
                continue;
            }
            bool isLeftOut = leavesOut && received == 0;
            throw Missing($"RAM block '{block.Name}': {(isLeftOut ? "the source leaves it out, and it has no file here" : $"{block.PageCount - received} of {block.PageCount} pages never came")}",
                $"{block.PageCount} pages", $"{received} pages", isLeftOut ? FileHint : "switch capability multifd on or off on both sides");
        }
    }

    /// <summary>A file that was made here and that nobody has written cannot hold the source's RAM.</summary>
    private static void ThrowIfNew(RamBlock block)
    {
        if (!block.IsKnownZero) return;
        var holes = new DirtyBitmap(block.PageCount);
        block.FindHoles(holes);
        if (holes.Count() == block.PageCount)
            throw Missing($"RAM block '{block.Name}': the source leaves it out, and file '{block.FilePath}' was made here and is empty", "the source's file", "an empty one", FileHint);
    }

    private static IncompatibleStateException Missing(string message, string expected, string found, string hint) =>
        new(message) { Section = RamConstants.IdStr, Expected = expected, Found = found, Hint = hint };
}
