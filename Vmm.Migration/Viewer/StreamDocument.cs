using Vmm.Migration.Ram;

namespace Vmm.Migration.Viewer;

/// <summary>What a piece of a stream is.</summary>
internal enum StreamEntryKind
{
    /// <summary>Magic and version.</summary>
    Header,
    /// <summary>Machine name and its subsections.</summary>
    Configuration,
    /// <summary>START section of an iterable.</summary>
    Start,
    /// <summary>PART section.</summary>
    Part,
    /// <summary>END section.</summary>
    End,
    /// <summary>FULL section.</summary>
    Full,
    /// <summary>A command; a package's content follows as entries one level deeper.</summary>
    Command,
    /// <summary>End of the stream or of a package.</summary>
    Eof,
    /// <summary>The description at the end.</summary>
    VmDescription,
    /// <summary>Bytes that could not be read.</summary>
    Unread,
}

/// <summary>One value of a section, or a group of them.</summary>
/// <param name="Name">Field name, or a subsection's name.</param>
/// <param name="Type">Type as VMDESC gives it.</param>
/// <param name="Offset">Absolute file offset.</param>
/// <param name="Length">Bytes.</param>
/// <param name="Value">
/// <see cref="long"/>, <see cref="ulong"/>, <see cref="bool"/>, <see cref="string"/> (text, or bytes as hex), a list of these, or null for a
/// group.
/// </param>
/// <param name="Children">Members of a struct, elements of a list.</param>
internal sealed record StreamField(string Name, string Type, long Offset, long Length, object? Value, IReadOnlyList<StreamField> Children);

/// <summary>Pages of one block in one RAM section.</summary>
/// <param name="Block">Block name.</param>
internal sealed record RamPageCounts(string Block)
{
    /// <summary>Pages sent as data, or present in a mapped-ram file.</summary>
    public long Data { get; internal set; }

    /// <summary>Pages sent as zero.</summary>
    public long Zero { get; internal set; }

    /// <summary>Pages sent as delta.</summary>
    public long Xbzrle { get; internal set; }
}

/// <summary>One page record.</summary>
/// <param name="Block">Block name.</param>
/// <param name="PageOffset">Offset in the block.</param>
/// <param name="Kind">Page, Zero or Xbzrle.</param>
/// <param name="FileOffset">Absolute file offset of the record; of the page itself in a mapped-ram file.</param>
internal readonly record struct RamPageRecord(string Block, ulong PageOffset, Ram.RamSaveFlags Kind, long FileOffset);

/// <summary>A RAM block as the setup record describes it, and its pages over the whole stream.</summary>
/// <param name="Name">Block name.</param>
/// <param name="UsedLength">Bytes; 0 when the stream has no setup record.</param>
internal sealed record RamBlockSummary(string Name, ulong UsedLength)
{
    /// <summary>Page size where the record names one.</summary>
    public ulong? PageSize { get; init; }

    /// <summary>Guest-physical address where the record names one.</summary>
    public ulong? Address { get; init; }

    /// <summary>File offset of the mapped-ram bitmap, or null.</summary>
    public ulong? BitmapOffset { get; init; }

    /// <summary>File offset of the mapped-ram pages, or null.</summary>
    public ulong? PagesOffset { get; init; }

    /// <summary>Counts over all sections.</summary>
    public RamPageCounts Pages { get; } = new(Name);
}

/// <summary>One piece of a stream.</summary>
/// <param name="Kind">What it is.</param>
/// <param name="Offset">Absolute file offset of its first byte.</param>
internal sealed record StreamEntry(StreamEntryKind Kind, long Offset)
{
    /// <summary>Bytes, footer included. A mapped-ram section spans its pages.</summary>
    public long Length { get; internal set; }

    /// <summary>0, or 1 inside a package.</summary>
    public int Depth { get; init; }

    /// <summary>Section name, command name or machine name.</summary>
    public string? Name { get; init; }

    /// <summary>Section id.</summary>
    public uint? SectionId { get; init; }

    /// <summary>Instance id of a section.</summary>
    public uint? InstanceId { get; init; }

    /// <summary>Version of a section, or of the header.</summary>
    public uint? VersionId { get; init; }

    /// <summary>Values, as far as their form is known.</summary>
    public IReadOnlyList<StreamField> Fields { get; internal set; } = [];

    /// <summary>Pages, for a RAM section.</summary>
    public IReadOnlyList<RamPageCounts> Ram { get; internal set; } = [];

    /// <summary>Page records, when asked for.</summary>
    public IReadOnlyList<RamPageRecord> Pages { get; internal set; } = [];
}

/// <summary>How bad a finding is.</summary>
internal enum StreamSeverity
{
    /// <summary>Worth knowing; a receiver accepts it.</summary>
    Note,
    /// <summary>Breaks the format; reading went on.</summary>
    Violation,
    /// <summary>Breaks the format; nothing after it could be read.</summary>
    Fatal,
}

/// <summary>Something about a stream that is not as the format has it.</summary>
/// <param name="Severity">How bad.</param>
/// <param name="Offset">Absolute file offset.</param>
/// <param name="Section">Where, e.g. <c>ram/0</c>.</param>
/// <param name="Message">What was expected and found.</param>
internal sealed record StreamFinding(StreamSeverity Severity, long Offset, string Section, string Message)
{
    /// <summary>One line.</summary>
    /// <returns>The text.</returns>
    public override string ToString() => $"offset 0x{Offset:x} ({Section}): {Message}";
}

/// <summary>A stream, taken apart.</summary>
public sealed class StreamDocument
{
    internal StreamDocument(string name, long lengthBytes) => (Name, LengthBytes) = (name, lengthBytes);

    /// <summary>The file's name.</summary>
    public string Name { get; }

    /// <summary>Length of the file.</summary>
    public long LengthBytes { get; }

    /// <summary>File offset at which the stream starts.</summary>
    public long StartOffset { get; internal set; }

    /// <summary>Bytes of a target page.</summary>
    public int PageSize { get; internal set; } = 4096;

    /// <summary>Machine type, or null when the stream does not say.</summary>
    public string? Machine { get; internal set; }

    /// <summary>True if a VMDESC was found.</summary>
    public bool HasVmDescription { get; internal set; }

    /// <summary>True if the stream was read to its end.</summary>
    public bool IsComplete { get; internal set; }

    /// <summary>Pieces in stream order.</summary>
    internal IReadOnlyList<StreamEntry> Entries => EntryList;

    /// <summary>RAM blocks in stream order.</summary>
    internal IReadOnlyList<RamBlockSummary> RamBlocks => BlockList;

    /// <summary>Notes and violations in the order they were met; at most <see cref="Core.Wire.WireLimits.ViewerFindings"/>.</summary>
    internal IReadOnlyList<StreamFinding> Findings => FindingList;

    /// <summary>Findings that are not mere notes.</summary>
    internal IEnumerable<StreamFinding> Violations => FindingList.Where(static f => f.Severity != StreamSeverity.Note);

    /// <summary>True if nothing breaks the format.</summary>
    public bool IsValid => !Violations.Any();

    /// <summary>Writes everything for a person: one line an entry, its fields indented below it, then <see cref="WriteFindings"/>.</summary>
    /// <param name="output">Receives lines.</param>
    public void WriteText(TextWriter output) => StreamText.Write(this, output);

    /// <summary>Writes what is not as the format has it, with file offsets, and a verdict.</summary>
    /// <param name="output">Receives lines.</param>
    public void WriteFindings(TextWriter output) => StreamText.WriteFindings(this, output);

    /// <summary>Writes the same as one JSON object. Keys are lower case with hyphens; opaque bytes are hex strings.</summary>
    /// <param name="output">Receives UTF-8; stays open.</param>
    /// <param name="withEntries">False leaves the entries out and keeps the summary and the findings.</param>
    public void WriteJson(System.IO.Stream output, bool withEntries = true) => StreamJson.Write(this, output, withEntries);

    internal List<StreamEntry> EntryList { get; } = [];

    internal List<RamBlockSummary> BlockList { get; } = [];

    internal List<StreamFinding> FindingList { get; } = [];

    internal void Add(StreamSeverity severity, long offset, string section, string message)
    {
        // The end is always recorded.
        if (FindingList.Count < Core.Wire.WireLimits.ViewerFindings || severity == StreamSeverity.Fatal) FindingList.Add(new StreamFinding(severity, offset, section, message));
    }
}
