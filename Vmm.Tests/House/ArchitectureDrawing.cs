namespace Vmm.Tests.House;

/// <summary>
/// Reads a box of the drawing in docs/architecture.md: <c>+- NAME ---+</c> above, <c>|  Folder  Folder  |</c> for each row, <c>+----+</c> below.
/// Boxes may stand side by side. A slash separates a sub-folder; a type in parentheses stands for the project's top folder, which is read as ".".
/// </summary>
internal static class ArchitectureDrawing
{
    /// <summary>The rows of a box, top to bottom, named as in <see cref="FolderRules"/>.</summary>
    public static IReadOnlyList<string[]> Rows(string[] page, string box)
    {
        int at = Array.FindIndex(page, l => l.Contains($"+- {box} -", StringComparison.Ordinal));
        if (at < 0) return [];
        int from = page[at].IndexOf($"+- {box} -", StringComparison.Ordinal), to = page[at].IndexOf('+', from + 1);
        return [.. page.Skip(at + 1).TakeWhile(l => l.Length > from && l[from] == '|').Select(l =>
            l[(from + 1)..to].Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(static f => f[0] == '(' ? "." : f.Replace('/', '.')).ToArray())];
    }
}
