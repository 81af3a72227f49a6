using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Parameters;

namespace Vmm.Migration.Stream;

/// <summary>The end of a stream (stream 1.6): <c>u8 0 EOF, u8 6 VMDESC, be32 length, JSON</c>.</summary>
internal static class StreamEnd
{
    internal static void Write(QemuFileWriter f, SaveStream stream, MachineIdentity machine)
    {
        stream.WriteEof();
        if (stream.Context.Compat.SuppressVmDesc) return;
        byte[] json = Describe(stream, machine).ToBytes();
        f.WriteByte((byte)SectionType.VmDescription);
        f.WriteUInt32((uint)json.Length);
        f.Write(json);
    }

    /// <summary>Reads and drops VMDESC after EOF. A stream without it is accepted.</summary>
    internal static void Skip(QemuFileReader f, LoadContext context)
    {
        f.Section = "vmdesc";
        if (context.Compat.SuppressVmDesc || f.Peek(1) is not [(byte)SectionType.VmDescription]) return;
        f.ReadByte();
        uint length = f.ReadUInt32();
        if (length > WireLimits.VmDescBytes) throw f.Over($"a VMDESC of {length} bytes", WireLimits.VmDescBytes, nameof(WireLimits.VmDescBytes));
        f.Skip(length);
    }

    private static VmDescJson Describe(SaveStream stream, MachineIdentity machine)
    {
        var json = new VmDescJson();
        json.StartObject();
        if (stream.Context.Compat is { LegacyDescriptions: false, SendConfiguration: true }) DescribeConfiguration(json, stream, machine);
        json.Member("page_size", RamBlock.PageSize);
        json.StartArray("devices");
        json.Raw(stream.FullSections);
        json.EndArray();
        json.EndObject();
        return json;
    }

    private static void DescribeConfiguration(VmDescJson json, SaveStream stream, MachineIdentity machine)
    {
        json.StartObject("configuration");
        json.Member("vmsd_name", "configuration");
        json.Member("version", 1);
        json.StartArray("fields");
        Field(json, "len", "uint32", 4);
        Field(json, "name", "buffer", machine.Machine.Length);
        json.EndArray();
        MigrationCapability[] capabilities = StreamHeader.Listed(stream.Context);
        bool sendsUuid = StreamHeader.SendsUuid(machine, stream.Context);
        if (capabilities.Length > 0 || sendsUuid) json.StartArray("subsections");
        if (capabilities.Length > 0)
        {
            Subsection(json, "configuration/capabilities");
            Field(json, "caps_count", "uint32", 4);
            // QEMU gives the size of the first for all of them.
            Field(json, "capabilities", "capability", 1 + capabilities[0].ToWireName().Length, capabilities.Length > 1 ? capabilities.Length : 0);
            json.EndArray();
            json.EndObject();
        }
        if (sendsUuid)
        {
            Subsection(json, "configuration/uuid");
            Field(json, "uuid.data", "uint8", 1, arrayLength: 16);
            json.EndArray();
            json.EndObject();
        }
        if (capabilities.Length > 0 || sendsUuid) json.EndArray();
        json.EndObject();
    }

    /// <summary>Opens a subsection and its fields.</summary>
    private static void Subsection(VmDescJson json, string name)
    {
        json.StartObject();
        json.Member("vmsd_name", name);
        json.Member("version", 1);
        json.StartArray("fields");
    }

    private static void Field(VmDescJson json, string name, string type, int size, int arrayLength = 0)
    {
        json.StartObject();
        json.Member("name", name);
        if (arrayLength > 0) json.Member("array_len", arrayLength);
        json.Member("type", type);
        json.Member("size", size);
        json.EndObject();
    }
}
