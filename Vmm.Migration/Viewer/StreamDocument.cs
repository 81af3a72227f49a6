using Vmm.Migration.Ram;

namespace Vmm.Migration.Viewer;

/// <summary>The kinds of pieces that a stream consists of.</summary>
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
    /// <summary>A command; the content of a package follows as entries one level deeper.</summary>
    Command,
    /// <summary>End of the stream or of a package.</summary>
    Eof,
    /// <summary>VMDESC, the description at the end.</summary>
    VmDescription,
    /// <summary>Bytes that the viewer could not read.</summary>
    Unread,
}

/// <summary>One value of a section, or a group of them.</summary>
/// <param name="Name">Name of the field or of the subsection.</param>
/// <param name="Type">Type as VMDESC names it.</param>
/// <param name="Offset">Absolute file offset.</param>
/// <param name="Length">Length in the file, bytes.</param>
/// <param name="Value">
/// <see cref="long"/>, <see cref="ulong"/>, <see cref="bool"/>, <see cref="string"/> (text, or bytes as hex), a list of these, or null for
/// a group.
/// </param>
/// <param name="Children">Members of a struct, elements of a list.</param>
internal sealed record StreamField(string Name, string Type, long Offset, long Length, object? Value, IReadOnlyList<StreamField> Children);

/// <summary>Numbers of pages of one block in one RAM section.</summary>
/// <param name="Block">Name of the RAM block.</param>
internal sealed record RamPageCounts(string Block)
{
    /// <summary>Pages sent as data, or stored in a mapped-ram file.</summary>
    public long Data { get; internal set; }

    /// <summary>Pages sent as zero pages.</summary>
    public long Zero { get; internal set; }

    /// <summary>Pages sent as XBZRLE deltas.</summary>
    public long Xbzrle { get; internal set; }
}

/// <summary>One page record.</summary>
/// <param name="Block">Name of the RAM block.</param>
/// <param name="PageOffset">Offset of the page in the block, bytes.</param>
/// <param name="Kind">Page, Zero or Xbzrle.</param>
/// <param name="FileOffset">Absolute file offset of the record; of the page itself in a mapped-ram file.</param>
internal readonly record struct RamPageRecord(string Block, ulong PageOffset, Ram.RamSaveFlags Kind, long FileOffset);

/// <summary>A RAM block as the setup record describes it, and its pages over the whole stream.</summary>
/// <param name="Name">Name of the block.</param>
/// <param name="UsedLength">Used length in bytes; 0 when the stream has no setup record.</param>
internal sealed record RamBlockSummary(string Name, ulong UsedLength)
{
    /// <summary>Page size in bytes, if the setup record gives one.</summary>
    public ulong? PageSize { get; init; }

    /// <summary>Guest-physical address, if the setup record gives one.</summary>
    public ulong? Address { get; init; }

    /// <summary>File offset of the mapped-ram bitmap, or null.</summary>
    public ulong? BitmapOffset { get; init; }

    /// <summary>File offset of the mapped-ram pages, or null.</summary>
    public ulong? PagesOffset { get; init; }

    /// <summary>Numbers of pages over all sections.</summary>
    public RamPageCounts Pages { get; } = new(Name);
}

/// <summary>One piece of a stream.</summary>
/// <param name="Kind">The kind of the piece.</param>
/// <param name="Offset">Absolute file offset of its first byte.</param>
internal sealed record StreamEntry(StreamEntryKind Kind, long Offset)
{
    /// <summary>Length in bytes with the footer. A mapped-ram section includes its pages.</summary>
    public long Length { get; internal set; }

    /// <summary>1 inside a package, else 0.</summary>
    public int Depth { get; init; }

    /// <summary>Name of the section, the command or the machine.</summary>
    public string? Name { get; init; }

    /// <summary>Section id.</summary>
    public uint? SectionId { get; init; }

    /// <summary>Instance id of a section.</summary>
    public uint? InstanceId { get; init; }

    /// <summary>Version of a section, or of the header.</summary>
    public uint? VersionId { get; init; }

    /// <summary>Values, as far as their layout is known.</summary>
    public IReadOnlyList<StreamField> Fields { get; internal set; } = [];

    /// <summary>Pages, for a RAM section.</summary>
    public IReadOnlyList<RamPageCounts> Ram { get; internal set; } = [];

    /// <summary>Page records, if <see cref="StreamViewOptions.ListPages"/> asks for them.</summary>
    public IReadOnlyList<RamPageRecord> Pages { get; internal set; } = [];
}

/// <summary>How severe a finding is.</summary>
internal enum StreamSeverity
{
    /// <summary>Worth knowing; a receiver accepts it.</summary>
    Note,
    /// <summary>Breaks the format, but the viewer could read on.</summary>
    Violation,
    /// <summary>Breaks the format, and the viewer could read nothing after it.</summary>
    Fatal,
}

/// <summary>A place where a stream deviates from the format.</summary>
/// <param name="Severity">How severe the finding is.</param>
/// <param name="Offset">Absolute file offset.</param>
/// <param name="Section">The section, e.g. <c>ram/0</c>.</param>
/// <param name="Message">What the format demands and what the stream has.</param>
internal sealed record StreamFinding(StreamSeverity Severity, long Offset, string Section, string Message)
{
    /// <summary>Formats the finding as one line.</summary>
    /// <returns>Offset, section and message.</returns>
    public override string ToString() => $"offset 0x{Offset:x} ({Section}): {Message}";
}

/// <summary>A stream, decoded into its pieces. Does not change once it is read; any thread.</summary>
public sealed class StreamDocument
{
    internal StreamDocument(string name, long lengthBytes) => (Name, LengthBytes) = (name, lengthBytes);

    /// <summary>Reads a file as far as it goes; what breaks the format is in the document, not thrown.</summary>
    /// <param name="path">Path of the file; the stream may start after zero bytes.</param>
    /// <param name="listPages">Keep every page record, up to a million, for <see cref="WriteText"/> and <see cref="WriteJson"/>.</param>
    /// <returns>The document.</returns>
    /// <exception cref="Core.Errors.ChannelException">The file cannot be opened or read.</exception>
    public static StreamDocument ReadFile(string path, bool listPages = false) => StreamViewer.ReadFile(path, new StreamViewOptions { ListPages = listPages });

    /// <summary>The file's name.</summary>
    public string Name { get; }

    /// <summary>Length of the file, with what stands before and after the stream.</summary>
    public long LengthBytes { get; }

    /// <summary>File offset at which the stream starts.</summary>
    public long StartOffset { get; internal set; }

    /// <summary>Size of a target page in bytes.</summary>
    public int PageSize { get; internal set; } = 4096;

    /// <summary>Machine type, or null when the stream does not say.</summary>
    public string? Machine { get; internal set; }

    /// <summary>True if a VMDESC was found.</summary>
    public bool HasVmDescription { get; internal set; }

    /// <summary>True if the stream was read to its end.</summary>
    public bool IsComplete { get; internal set; }

    /// <summary>The pieces in stream order.</summary>
    internal IReadOnlyList<StreamEntry> Entries => EntryList;

    /// <summary>The RAM blocks in stream order.</summary>
    internal IReadOnlyList<RamBlockSummary> RamBlocks => BlockList;

    /// <summary>Notes and violations in the order in which the viewer met them; at most <see cref="Core.Wire.WireLimits.ViewerFindings"/>.</summary>
    internal IReadOnlyList<StreamFinding> Findings => FindingList;

    /// <summary>The findings that break the format.</summary>
    internal IEnumerable<StreamFinding> Violations => FindingList.Where(static f => f.Severity != StreamSeverity.Note);

    /// <summary>True if nothing breaks the format.</summary>
    public bool IsValid => !Violations.Any();

    /// <summary>Writes the document as text for people: one line an entry, with its fields indented below, then <see cref="WriteFindings"/>.</summary>
    /// <param name="output">Receives the lines.</param>
    public void WriteText(TextWriter output) => StreamText.Write(this, output);

    /// <summary>Writes the findings with their file offsets, and a verdict.</summary>
    /// <param name="output">Receives the lines.</param>
    public void WriteFindings(TextWriter output) => StreamText.WriteFindings(this, output);

    /// <summary>Writes the document as one JSON object, for programs. Keys are lower case with hyphens; opaque bytes are hex strings.</summary>
    /// <param name="output">Receives the object as UTF-8; stays open.</param>
    /// <param name="withEntries">False leaves the entries out and keeps the summary and the findings.</param>
    public void WriteJson(System.IO.Stream output, bool withEntries = true) => StreamJson.Write(this, output, withEntries);

    internal List<StreamEntry> EntryList { get; } = [];

    internal List<RamBlockSummary> BlockList { get; } = [];

    internal List<StreamFinding> FindingList { get; } = [];

    internal void Add(StreamSeverity severity, long offset, string section, string message)
    {
        // The finding that ended the reading is always recorded.
        if (FindingList.Count < Core.Wire.WireLimits.ViewerFindings || severity == StreamSeverity.Fatal) FindingList.Add(new StreamFinding(severity, offset, section, message));
    }
}
