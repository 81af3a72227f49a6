namespace Vmm.Tools.Cli.Snapshots;

/// <summary>One line of <c>info snapshots</c> (qmp 10).</summary>
internal sealed record SnapshotRow(string Name, string Size, string Date, string VmClock)
{
    /// <summary>Reads the table: a title, a head line <c>ID TAG ...</c>, then <c>ID TAG SIZE UNIT DATE TIME CLOCK ICOUNT</c>.</summary>
    public static IReadOnlyList<SnapshotRow> Parse(string text)
    {
        var rows = new List<SnapshotRow>();
        bool inTable = false;
        foreach (string line in text.Split('\n'))
        {
            string[] cells = line.Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries);
            if (cells is ["ID", ..]) inTable = true;
            else if (inTable && cells.Length >= 7) rows.Add(new SnapshotRow(cells[1], $"{cells[2]} {cells[3]}", $"{cells[4]} {cells[5]}", cells[6]));
        }
        return rows;
    }
}
