using System.Buffers.Binary;
using System.Text;
using Vmm.Migration.Stream;

namespace Vmm.Tests.Support;

/// <summary>Builds valid and invalid streams from their parts.</summary>
internal sealed class StreamBuilder
{
    private readonly List<byte> _bytes = [];

    internal int Length => _bytes.Count;

    internal StreamBuilder Header(string machine = "none") => U32(StreamConstants.Magic).U32(3).U8(7).U32((uint)machine.Length).Text(machine);

    internal StreamBuilder U8(byte value) => Bytes([value]);

    internal StreamBuilder U16(ushort value) => Bytes([(byte)(value >> 8), (byte)value]);

    internal StreamBuilder U32(uint value)
    {
        Span<byte> b = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(b, value);
        return Bytes(b);
    }

    internal StreamBuilder U64(ulong value) => U32((uint)(value >> 32)).U32((uint)value);

    internal StreamBuilder Bytes(ReadOnlySpan<byte> bytes)
    {
        _bytes.AddRange(bytes);
        return this;
    }

    internal StreamBuilder Text(string text) => Bytes(Encoding.Latin1.GetBytes(text));

    internal StreamBuilder Counted(string text) => U8((byte)text.Length).Text(text);

    internal StreamBuilder Command(ushort command, ReadOnlySpan<byte> payload = default) => U8(8).U16(command).U16((ushort)payload.Length).Bytes(payload);

    internal StreamBuilder First(byte type, uint id, string idStr, uint instance, uint version) => U8(type).U32(id).Counted(idStr).U32(instance).U32(version);

    internal StreamBuilder Footer(uint id) => U8(0x7e).U32(id);

    /// <summary>A whole FULL section.</summary>
    internal StreamBuilder Full(uint id, string idStr, uint version, ReadOnlySpan<byte> body) => First(4, id, idStr, 0, version).Bytes(body).Footer(id);

    /// <summary>The START section of ram, with one block or with the body that the action writes.</summary>
    internal StreamBuilder RamStart(ulong length = 0x4000, Action<StreamBuilder>? body = null, uint id = 1)
    {
        First(1, id, "ram", 0, 4);
        if (body is null) U64(length | 4).Counted("m").U64(length);
        else body(this);
        return U64(0x10).Footer(id);
    }

    internal StreamBuilder RamPart(Action<StreamBuilder> body, uint id = 1, byte type = 2)
    {
        U8(type).U32(id);
        body(this);
        return U64(0x10).Footer(id);
    }

    internal StreamBuilder Eof() => U8(0);

    internal StreamBuilder VmDesc(string json) => U8(6).U32((uint)json.Length).Text(json);

    /// <summary>EOF and a VMDESC with one device.</summary>
    internal StreamBuilder Described(string name, int version, string fields, string subsections = "") =>
        Eof().VmDesc($$"""{"page_size": 4096, "devices": [{"name": "{{name}}", "instance_id": 0, "vmsd_name": "{{name}}", "version": {{version}}, "fields": [{{fields}}]{{subsections}}}]}""");

    internal byte[] ToArray() => [.. _bytes];
}
