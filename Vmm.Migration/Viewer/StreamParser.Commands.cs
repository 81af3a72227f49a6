using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Viewer;

/// <summary>Reads the header, the configuration (stream 1.2) and commands (stream 6.1).</summary>
internal sealed partial class StreamParser
{
    private void ReadHeader()
    {
        long at = _f.Position;
        _f.ReadUInt32();
        uint version = _f.ReadUInt32();
        if (version != StreamConstants.Version) throw _f.Bad("stream version", "3", version == StreamConstants.ObsoleteVersion ? "2, which is obsolete" : version.ToString(), at + 4);
        Close(Add(new StreamEntry(StreamEntryKind.Header, at) { VersionId = version }));
    }

    /// <summary>Reads 07, u32 length, machine name, then subsections.</summary>
    private void ReadConfiguration()
    {
        long at = _f.Position;
        _f.Section = "configuration";
        if (_f.Peek(1) is not [(byte)SectionType.Configuration])
        {
            if (_f.Peek(1).Length > 0) Note(at, "no configuration section");
            return;
        }
        _f.ReadByte();
        uint length = _f.ReadUInt32();
        if (length > WireLimits.MachineNameBytes) throw _f.Over($"a machine name of {length} bytes", WireLimits.MachineNameBytes, nameof(WireLimits.MachineNameBytes));
        byte[] name = new byte[length];
        _f.Read(name);
        _document.Machine = Encoding.Latin1.GetString(name);
        CheckDescribedConfiguration(length, at);
        StreamEntry entry = Add(new StreamEntry(StreamEntryKind.Configuration, at) { Name = _document.Machine });
        var fields = new List<StreamField> { new("name", "string", at + 5, length, _document.Machine, []) };
        while (_f.Peek(1) is [(byte)SectionType.Subsection]) fields.Add(ReadConfigurationSubsection());
        entry.Fields = fields;
        Close(entry);
    }

    private void CheckDescribedConfiguration(uint length, long at)
    {
        if (_description?.Configuration is not { } described) return;
        long? found = described.Fields.Find(static f => f.Name == "name")?.Size;
        if (found is { } size && size != length) Violation(at, $"the machine name has {length} bytes, VMDESC says {size}");
    }

    private StreamField ReadConfigurationSubsection()
    {
        long at = _f.Position;
        _f.ReadByte();
        string name = _f.ReadCountedString();
        uint version = _f.ReadUInt32();
        if (version != 1) Violation(at, $"subsection '{name}': version {version}, 1 is expected");
        long body = _f.Position;
        object value;
        string type;
        switch (name)
        {
            case "configuration/target-page-bits":
                uint bits = _f.ReadUInt32();
                SetPageSize(bits < 32 ? 1L << (int)bits : 0, body);
                (value, type) = ((ulong)bits, "uint32");
                break;
            case "configuration/capabilities":
                (value, type) = (ReadCapabilities(), "capability");
                break;
            case "configuration/uuid":
                Span<byte> uuid = stackalloc byte[16];
                _f.Read(uuid);
                (value, type) = (new Guid(uuid, bigEndian: true).ToString(), "uuid");
                break;
            default: throw _f.Bad("subsection of configuration", "target-page-bits, capabilities or uuid", $"'{name}'", at);
        }
        return new StreamField(name, type, at, _f.Position - at, value, []);
    }

    private List<object> ReadCapabilities()
    {
        uint count = _f.ReadUInt32();
        if (count > WireLimits.Capabilities) throw new StreamLimitException($"{count} capabilities are over {WireLimits.Capabilities} (WireLimits.Capabilities)");
        var names = new List<object>();
        for (uint i = 0; i < count; i++) names.Add(_f.ReadCountedString());
        _layout = _layout with { HasAddress = names.Contains("x-ignore-shared"), IsMappedRam = names.Contains("mapped-ram") };
        return names;
    }

    /// <summary>Reads 08, u16 command, u16 length, payload; the bytes of a package follow its payload.</summary>
    private void ReadCommand(long at)
    {
        _f.Section = "command";
        var command = (MigCommand)_f.ReadUInt16();
        int length = _f.ReadUInt16();
        long end = _f.Position + length;
        bool known = Enum.IsDefined(command) && command != MigCommand.Invalid;
        StreamEntry entry = Add(new StreamEntry(StreamEntryKind.Command, at) { Depth = _depth, Name = known ? command.ToString() : $"unknown command {(ushort)command}" });
        if (!known) Violation(at, $"command {(ushort)command} is not known");
        var fields = new List<StreamField>();
        if (known && HasRightLength(command, length)) ReadPayload(command, length, fields);
        else if (known) Violation(at, $"command {command} has a payload of {length} bytes");
        if (_f.Position > end) Violation(at, $"the payload of command {command} goes past its length of {length} bytes");
        else _f.Skip(end - _f.Position);
        entry.Fields = fields;
        Close(entry);
        if (command == MigCommand.Packaged && fields.Count == 1) ReadPackage(entry, (uint)(ulong)fields[0].Value!);
    }

    private static bool HasRightLength(MigCommand command, int length) => command switch
    {
        MigCommand.Ping or MigCommand.Packaged => length == 4,
        MigCommand.PostcopyAdvise => length is 0 or 16,
        MigCommand.PostcopyRamDiscard => length >= 3 + 16,
        MigCommand.RecvBitmap => length >= 2,
        _ => length == 0,
    };

    private void ReadPayload(MigCommand command, int length, List<StreamField> fields)
    {
        long at = _f.Position;
        switch (command)
        {
            case MigCommand.OpenReturnPath:
                _hasReturnPath = true;
                break;
            case MigCommand.Ping:
                if (!_hasReturnPath) Violation(at, "PING without an open return path");
                fields.Add(new StreamField("value", "uint32", at, 4, (ulong)_f.ReadUInt32(), []));
                break;
            case MigCommand.PostcopyAdvise when length == 16:
                ulong summary = _f.ReadUInt64(), page = _f.ReadUInt64();
                _layout = _layout with { PageSizeSummary = summary };
                fields.Add(new StreamField("page_size_summary", "uint64", at, 8, summary, []));
                fields.Add(new StreamField("target_page_size", "uint64", at + 8, 8, page, []));
                break;
            case MigCommand.Packaged:
                fields.Add(new StreamField("length", "uint32", at, 4, (ulong)_f.ReadUInt32(), []));
                break;
            case MigCommand.RecvBitmap:
                ReadBlockName(fields);
                break;
            case MigCommand.PostcopyRamDiscard:
                ReadDiscard(length, fields);
                break;
        }
    }

    private void ReadBlockName(List<StreamField> fields)
    {
        long at = _f.Position;
        string name = _f.ReadCountedString();
        fields.Add(new StreamField("block", "string", at, _f.Position - at, name, []));
    }

    /// <summary>Reads u8 0, cs block, u8 0, then ranges of u64 start, u64 length.</summary>
    private void ReadDiscard(int length, List<StreamField> fields)
    {
        long at = _f.Position, end = at + length;
        byte version = _f.ReadByte();
        if (version != 0) Violation(at, $"RAM discard version {version}, expected 0");
        ReadBlockName(fields);
        if (_f.ReadByte() != 0) Violation(_f.Position - 1, "the block name of a RAM discard does not end in 0");
        long left = end - _f.Position;
        if (left <= 0 || left % 16 != 0) Violation(_f.Position, $"{left} bytes of RAM discard ranges, expected 16 bytes a range");
        for (; left >= 16; left -= 16)
        {
            long range = _f.Position;
            ulong start = _f.ReadUInt64(), bytes = _f.ReadUInt64();
            if (bytes == 0) Violation(range, "an empty RAM discard range");
            fields.Add(new StreamField("range", "range", range, 16, $"0x{start:x}+0x{bytes:x}", []));
        }
    }

    /// <summary>Reads a package: a complete stream inside the stream, which EOF or its length ends (stream 6.1).</summary>
    private void ReadPackage(StreamEntry entry, uint length)
    {
        if (_depth > 0) throw _f.Bad("command", "no package inside a package", "PACKAGED", entry.Offset);
        long end = _f.Position + length;
        if (end > _document.LengthBytes)
            throw new StreamTruncatedException($"a package of {length} bytes at offset 0x{_f.Position:x} goes past the end of the file at 0x{_document.LengthBytes:x}") { Offset = _f.Position };
        _depth++;
        ReadSections(end);
        _depth--;
        if (_f.Position != end) throw _f.Bad("end of a package", $"offset {end}", $"offset {_f.Position}");
    }
}
