using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Ram;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Decodes a stream without a machine (stream 1): the framing by its grammar, RAM by the engine's grammar, device sections by the VMDESC at the end.
/// One object decodes one stream. Whatever the file contains, memory stays within the viewer's limits in <see cref="WireLimits"/> and the result is a
/// document with findings; only a file that cannot be read throws.
/// </summary>
internal sealed partial class StreamParser
{
    private const long LongestHoleBytes = 1 << 30;

    private readonly ISeekableChannel _file;
    private readonly StreamViewOptions _options;
    private readonly StreamDocument _document;
    private readonly QemuFileReader _f;
    private readonly StateReader _states;
    private readonly VfioSectionReader _vfio;
    private readonly Dictionary<uint, BoundSection> _sections = [];
    private readonly HashSet<(string, uint)> _fullSeen = [];
    private readonly Dictionary<(string, long), Queue<DescribedDevice>> _devices = [];
    private VmDescription? _description;
    private (long Offset, int LengthBytes)? _descriptionAt;
    private RamSectionReader? _ram;
    private RamBlockLayout _layout;
    private bool? _footers;
    private bool _hasReturnPath;
    private bool _hasHeader = true;
    private int _depth;
    // The entry that is being read.
    private StreamEntry? _open;

    private StreamParser(ISeekableChannel file, string name, StreamViewOptions options)
    {
        _file = file;
        _options = options;
        _document = new StreamDocument(name, file.LengthBytes);
        _f = new QemuFileReader(file);
        _vfio = new VfioSectionReader(_f);
        _states = new StateReader(_f, (offset, message) => Violation(offset, message));
    }

    /// <summary>Decodes a file.</summary>
    /// <exception cref="ChannelException">The file cannot be read.</exception>
    internal static StreamDocument Parse(ISeekableChannel file, string name, StreamViewOptions options)
    {
        file.Position = 0;
        var parser = new StreamParser(file, name, options);
        try
        {
            parser.ReadAll();
        }
        catch (VmmException e) when (e is not ChannelException)
        {
            parser.Fail(e);
        }
        parser.Finish();
        return parser._document;
    }

    private void ReadAll()
    {
        _f.Section = "header";
        FindStart();
        FindDescription();
        if (_hasHeader)
        {
            ReadHeader();
            ReadConfiguration();
        }
        else
        {
            // The new connection of a postcopy recovery has no header, and its return path is open (stream 7.6).
            Note(_f.Position, "the stream has no header, as on the connection of a postcopy recovery");
            _hasReturnPath = true;
        }
        ReadSections(long.MaxValue);
        ReadEnd();
        _document.IsComplete = true;
    }

    /// <summary>Finds the start of the stream: <c>file:PATH,offset=N</c> leaves a hole before it (stream 5.1).</summary>
    private void FindStart()
    {
        long start = _options.StartOffset ?? FirstNonZero();
        if (start > _document.LengthBytes)
            throw new StreamTruncatedException($"the file has {_document.LengthBytes} bytes, but the stream should start at offset {start}") { Offset = start };
        _document.StartOffset = start;
        _f.Seek(start);
        ReadOnlySpan<byte> head = _f.Peek(4);
        if (head.Length < 4) throw new StreamTruncatedException($"the file ends at offset {start + head.Length}, inside the stream's first word") { Offset = start };
        uint magic = System.Buffers.Binary.BinaryPrimitives.ReadUInt32BigEndian(head);
        _hasHeader = head[0] != (byte)SectionType.Command;
        if (!_hasHeader || magic == StreamConstants.Magic) return;
        string what = magic == 0x11223344 ? "a multifd channel, which has pages only; the main channel's file has the sections" : $"0x{magic:x8}";
        throw _f.Bad("file magic", "'QEVM'", what, start);
    }

    private long FirstNonZero()
    {
        Span<byte> chunk = stackalloc byte[4096];
        long end = Math.Min(_document.LengthBytes, LongestHoleBytes);
        for (long at = 0; at < end; at += chunk.Length)
        {
            Span<byte> part = chunk[..(int)Math.Min(chunk.Length, end - at)];
            _file.ReadAt(part, at);
            int found = part.IndexOfAnyExcept((byte)0);
            if (found < 0) continue;
            // Zeros that no magic follows belong to the content, so the stream starts at 0.
            return part[found] == (byte)'Q' ? at + found : 0;
        }
        return 0;
    }

    private void FindDescription()
    {
        _descriptionAt = VmDescriptionFinder.Find(_file);
        if (_descriptionAt is not { } at) return;
        byte[] text = new byte[at.LengthBytes];
        _file.ReadAt(text, at.Offset + 5);
        try
        {
            _description = VmDescription.Parse(text);
        }
        catch (StreamFormatException e)
        {
            Violation(at.Offset, e.Message);
            return;
        }
        _document.HasVmDescription = true;
        if (_description.PageSize is { } pageSize) SetPageSize(pageSize, at.Offset);
        foreach (DescribedDevice device in _description.Devices)
        {
            if (!_devices.TryGetValue((device.Name, device.InstanceId), out Queue<DescribedDevice>? queue)) _devices[(device.Name, device.InstanceId)] = queue = new();
            queue.Enqueue(device);
        }
    }

    private void SetPageSize(long bytes, long at)
    {
        if (bytes is >= 4096 and <= 1 << 20 && long.IsPow2(bytes)) _document.PageSize = (int)bytes;
        else Violation(at, $"a page size of {bytes} bytes, expected a power of two from 4096 to 1 MiB");
    }

    /// <summary>Reads sections and commands up to EOF, or up to the end of a package.</summary>
    private void ReadSections(long end)
    {
        while (_f.Position < end)
        {
            long at = _f.Position;
            _f.Section = "framing";
            var type = (SectionType)_f.ReadByte();
            switch (type)
            {
                case SectionType.Eof:
                    Close(Add(new StreamEntry(StreamEntryKind.Eof, at) { Depth = _depth }));
                    return;
                case SectionType.Start or SectionType.Full: ReadFirst(type, at); break;
                case SectionType.Part or SectionType.End: ReadNext(type, at); break;
                case SectionType.Command: ReadCommand(at); break;
                default: throw _f.Bad("section type", "START, PART, END, FULL, COMMAND or EOF", $"0x{(byte)type:x2}", at);
            }
        }
    }

    /// <summary>Reads START or FULL: u32 id, cs idstr, u32 instance, u32 version, body, footer.</summary>
    private void ReadFirst(SectionType type, long at)
    {
        uint id = _f.ReadUInt32();
        string idStr = _f.ReadCountedString();
        uint instance = _f.ReadUInt32(), version = _f.ReadUInt32();
        _f.Section = $"{idStr}/{instance}";
        var section = new BoundSection(idStr, instance, version, type);
        if (_sections.TryGetValue(id, out BoundSection? other) && (other.IdStr, other.Instance) != (idStr, instance))
            Violation(at, $"section id {id} is taken by '{other.IdStr}/{other.Instance}'");
        else if (type == SectionType.Start && other is not null) Violation(at, "a second START section");
        if (type == SectionType.Full && !_fullSeen.Add((idStr, instance))) Violation(at, "a second FULL section");
        if (type == SectionType.Start && id == 0) Violation(at, "an iterable with section id 0, whose PART sections a QEMU receiver misreads");
        _sections[id] = section;
        StreamEntry entry = Add(new StreamEntry(type == SectionType.Start ? StreamEntryKind.Start : StreamEntryKind.Full, at)
        {
            Depth = _depth, Name = idStr, SectionId = id, InstanceId = instance, VersionId = version,
        });
        ReadBody(entry, section);
        ReadFooter(id);
        Close(entry);
    }

    /// <summary>Reads PART or END: u32 id, body, footer.</summary>
    private void ReadNext(SectionType type, long at)
    {
        uint id = _f.ReadUInt32();
        if (!_sections.TryGetValue(id, out BoundSection? section))
        {
            if (_hasHeader) throw _f.Bad("section id", "the id of a START section", id.ToString(), at);
            // A recovery connection uses the ids of the connection before it; only RAM has PART sections there.
            _sections[id] = section = new BoundSection(RamConstants.IdStr, 0, RamConstants.VersionId, SectionType.Start);
        }
        _f.Section = $"{section.IdStr}/{section.Instance}";
        if (section.Last is SectionType.End or SectionType.Full) Violation(at, $"a {type} section after its {section.Last} section");
        section.Last = type;
        StreamEntry entry = Add(new StreamEntry(type == SectionType.Part ? StreamEntryKind.Part : StreamEntryKind.End, at)
        {
            Depth = _depth, Name = section.IdStr, SectionId = id, InstanceId = section.Instance, VersionId = section.Version,
        });
        ReadBody(entry, section);
        ReadFooter(id);
        Close(entry);
    }

    private void ReadBody(StreamEntry entry, BoundSection section)
    {
        if (entry.Kind != StreamEntryKind.Full)
        {
            if (VfioSectionReader.Knows(section.IdStr))
            {
                entry.Fields = _vfio.Read();
                return;
            }
            if (section.IdStr != RamConstants.IdStr)
                throw _f.Bad("body of an iterable", "'ram' or 'PATH/vfio', whose forms are known", $"'{section.IdStr}'; nothing after offset 0x{_f.Position:x} can be read");
            if (section.Version != RamConstants.VersionId) Violation(entry.Offset, $"version {section.Version}, {RamConstants.VersionId} is expected");
            _ram ??= new RamSectionReader(_f, _file, _document, _options, Report) { Layout = _layout };
            _ram.Read(entry);
            return;
        }
        entry.Fields = _states.Read(Describe(entry));
    }

    /// <summary>Returns the layout of a FULL section's body.</summary>
    private DescribedState Describe(StreamEntry entry)
    {
        if (_devices.TryGetValue((entry.Name!, entry.InstanceId!.Value), out Queue<DescribedDevice>? queue) && queue.TryDequeue(out DescribedDevice? device))
        {
            if (device.Version is { } version && version != entry.VersionId)
                Violation(entry.Offset, $"version {entry.VersionId}, VMDESC says {version}");
            return device.State;
        }
        if (_description is not null && queue is null && _depth == 0) Violation(entry.Offset, "VMDESC does not describe this section");
        return BuiltInStates.Find(entry.Name!, entry.VersionId!.Value) ?? throw _f.Bad("body of a FULL section",
            _description is null ? "a VMDESC that describes it" : "its description in VMDESC", $"none, so its length is unknown and nothing after offset 0x{_f.Position:x} can be read");
    }

    private void ReadFooter(uint id)
    {
        // The sender does not announce whether it writes footers; the end of the first section shows it.
        if (_footers == false) return;
        ReadOnlySpan<byte> next = _f.Peek(1);
        bool present = next is [(byte)SectionType.Footer];
        if (_footers is null && next.Length > 0)
        {
            _footers = present;
            if (!present)
            {
                Note(_f.Position, "sections have no footers");
                return;
            }
        }
        long at = _f.Position;
        byte mark = _f.ReadByte();
        if (mark != (byte)SectionType.Footer) throw _f.Bad("section footer", "0x7e", $"0x{mark:x2}", at);
        uint found = _f.ReadUInt32();
        if (found != id) Violation(at, $"section footer has id {found}, the section has {id}");
    }

    /// <summary>Reads VMDESC and what follows it (stream 1.6).</summary>
    private void ReadEnd()
    {
        long at = _f.Position;
        _f.Section = "vmdesc";
        if (_f.Peek(1) is [(byte)SectionType.VmDescription])
        {
            _f.ReadByte();
            uint length = _f.ReadUInt32();
            if (length > _document.LengthBytes - _f.Position)
                throw new StreamTruncatedException($"VMDESC of {length} bytes at offset 0x{at:x} is cut off after {_document.LengthBytes - _f.Position}") { Offset = _f.Position };
            if (length > WireLimits.ViewerVmDescBytes)
                throw new StreamLimitException($"VMDESC of {length} bytes is over {WireLimits.ViewerVmDescBytes} (WireLimits.ViewerVmDescBytes)");
            if (_descriptionAt?.Offset != at) Violation(at, "VMDESC is here, but a search from the end of the file does not find it");
            _f.Skip(length);
            Close(Add(new StreamEntry(StreamEntryKind.VmDescription, at)));
        }
        else if (_descriptionAt is { } found)
        {
            Violation(at, $"the stream ends here, but VMDESC starts at offset 0x{found.Offset:x}");
        }
        else
        {
            Note(at, "no VMDESC");
        }
        long left = _document.LengthBytes - _f.Position;
        if (left > 0) Violation(_f.Position, $"{left} bytes follow the end of the stream");
        foreach (DescribedDevice device in _devices.Values.SelectMany(static q => q))
            Violation(at, $"VMDESC describes section '{device.Name}/{device.InstanceId}', which the stream does not have");
    }

    private void Fail(VmmException error)
    {
        long offset = error switch
        {
            StreamFormatException { Offset: { } o } => o,
            StreamTruncatedException { Offset: { } o } => o,
            _ => _f.Position,
        };
        // The finding has its own section and offset, so the message must not repeat them.
        string prefix = $"section '{_f.Section}', offset {offset}: ", message = error.Message;
        _document.Add(StreamSeverity.Fatal, offset, _f.Section, message.StartsWith(prefix, StringComparison.Ordinal) ? message[prefix.Length..] : message);
    }

    private void Finish()
    {
        if (_states.IsShortened || _vfio.IsShortened) Note(0, $"fields after the first {WireLimits.ViewerFields} are left out (WireLimits.ViewerFields)");
        if (_ram is { IsShortened: true }) Note(0, $"pages after the first {WireLimits.ViewerPages} are not listed (WireLimits.ViewerPages)");
        if (_document.IsComplete) return;
        if (_open is not null) Close(_open);
        StreamEntry? last = _document.EntryList.LastOrDefault();
        long from = last is null ? _document.StartOffset : last.Offset + last.Length;
        if (from < _document.LengthBytes)
            _document.EntryList.Add(new StreamEntry(StreamEntryKind.Unread, from) { Length = _document.LengthBytes - from });
    }

    private StreamEntry Add(StreamEntry entry)
    {
        if (_document.EntryList.Count >= WireLimits.ViewerEntries)
            throw new StreamLimitException($"more than {WireLimits.ViewerEntries} sections and commands (WireLimits.ViewerEntries); nothing after offset 0x{entry.Offset:x} is read");
        _document.EntryList.Add(entry);
        entry.Length = _f.Position - entry.Offset;
        return _open = entry;
    }

    private void Close(StreamEntry entry)
    {
        entry.Length = _f.Position - entry.Offset;
        _open = null;
    }

    private void Report(StreamSeverity severity, long offset, string message) => _document.Add(severity, offset, _f.Section, message);

    private void Violation(long offset, string message) => Report(StreamSeverity.Violation, offset, message);

    private void Note(long offset, string message) => Report(StreamSeverity.Note, offset, message);

    private sealed class BoundSection(string idStr, uint instance, uint version, SectionType last)
    {
        internal string IdStr => idStr;

        internal uint Instance => instance;

        internal uint Version => version;

        internal SectionType Last { get; set; } = last;
    }
}
