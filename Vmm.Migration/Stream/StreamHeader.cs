using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Parameters;

namespace Vmm.Migration.Stream;

/// <summary>The machine type and UUID of the VM that sends or takes a stream; an all-zero UUID means none.</summary>
internal sealed record MachineIdentity(string Machine, Guid Uuid);

/// <summary>
/// The beginning of a stream (stream 1.1, 1.2):
/// <code>
/// "QEVM" be32 3
/// u8 7 CONFIGURATION, be32 length, machine name, *subsection
/// subsection: u8 5, counted string name, be32 version, body
/// </code>
/// </summary>
internal static class StreamHeader
{
    /// <summary>The capabilities that change the layout of the stream, so that both sides must have the same (stream 1.2).</summary>
    private static readonly MigrationCapability[] s_listed = [MigrationCapability.XIgnoreShared, MigrationCapability.MappedRam];

    /// <summary>The bytes with which every stream starts: magic and version.</summary>
    internal static byte[] Start { get; } = [.. "QEVM"u8, 0, 0, 0, (byte)StreamConstants.Version];

    internal static void Write(QemuFileWriter f, MachineIdentity machine, SaveContext context)
    {
        f.WriteUInt32(StreamConstants.Magic);
        f.WriteUInt32(StreamConstants.Version);
        if (!context.Compat.SendConfiguration) return;
        f.WriteByte((byte)SectionType.Configuration);
        f.WriteUInt32((uint)machine.Machine.Length);
        f.Write(Encoding.ASCII.GetBytes(machine.Machine));
        MigrationCapability[] listed = Listed(context);
        if (listed.Length > 0)
        {
            f.WriteByte((byte)SectionType.Subsection);
            f.WriteCountedString("configuration/capabilities");
            f.WriteUInt32(1);
            f.WriteUInt32((uint)listed.Length);
            foreach (MigrationCapability capability in listed) f.WriteCountedString(capability.ToWireName());
        }
        if (!SendsUuid(machine, context)) return;
        f.WriteByte((byte)SectionType.Subsection);
        f.WriteCountedString("configuration/uuid");
        f.WriteUInt32(1);
        f.Write(machine.Uuid.ToByteArray(bigEndian: true));
    }

    /// <summary>The capabilities that the configuration names.</summary>
    internal static MigrationCapability[] Listed(SaveContext context) => [.. s_listed.Where(context.Capabilities.IsOn)];

    internal static bool SendsUuid(MachineIdentity machine, SaveContext context) =>
        context.Capabilities.IsOn(MigrationCapability.ValidateUuid) && machine.Uuid != Guid.Empty;

    /// <exception cref="VmmException">This is no stream, or one of another machine.</exception>
    internal static void Read(QemuFileReader f, MachineIdentity machine, LoadContext context)
    {
        f.Section = "header";
        uint magic = f.ReadUInt32();
        if (magic != StreamConstants.Magic)
            throw new StreamFormatException($"not a migration stream: it starts with 0x{magic:x8}, expected 0x{StreamConstants.Magic:x8} ('QEVM')")
            {
                Section = f.Section, Offset = 0, Expected = "QEVM", Found = $"0x{magic:x8}",
            };
        uint version = f.ReadUInt32();
        if (version == StreamConstants.ObsoleteVersion) throw f.Bad("stream version", "3", "2, which is obsolete", f.Position - 4);
        if (version != StreamConstants.Version) throw f.Bad("stream version", "3", version.ToString(), f.Position - 4);
        if (context.Compat.SendConfiguration) ReadConfiguration(f, machine, context);
    }

    private static void ReadConfiguration(QemuFileReader f, MachineIdentity machine, LoadContext context)
    {
        f.Section = "configuration";
        byte type = f.ReadByte();
        if (type != (byte)SectionType.Configuration) throw f.Bad("section type", "CONFIGURATION (0x07)", $"0x{type:x2}", f.Position - 1);
        uint length = f.ReadUInt32();
        if (length > WireLimits.MachineNameBytes) throw f.Over($"a machine name of {length} bytes", WireLimits.MachineNameBytes, nameof(WireLimits.MachineNameBytes));
        byte[] name = new byte[length];
        f.Read(name);
        string text = Encoding.Latin1.GetString(name);
        // QEMU compares as many bytes as were sent, so a prefix passes (stream 1.2).
        if (!machine.Machine.StartsWith(text, StringComparison.Ordinal))
            throw new IncompatibleStateException($"machine type differs: '{machine.Machine}' here, '{text}' in the stream")
            {
                Section = f.Section, Offset = f.Position, Expected = machine.Machine, Found = text, Hint = "start both sides with the same --machine",
            };
        MigrationCapabilities there = MigrationCapabilities.None;
        while (TryReadSubsection(f, out string subsection))
        {
            uint version = f.ReadUInt32();
            if ((byte)version > 1) throw f.Bad($"version of subsection '{subsection}'", "1", version.ToString(), f.Position - 4);
            switch (subsection)
            {
                case "configuration/target-page-bits":
                    uint bits = f.ReadUInt32();
                    if (bits != 12) throw f.Bad("target page bits", "12", bits.ToString());
                    break;
                case "configuration/capabilities":
                    there = ReadCapabilities(f);
                    break;
                case "configuration/uuid":
                    CheckUuid(f, machine, context);
                    break;
                default:
                    throw f.Bad("subsection of configuration", "target-page-bits, capabilities or uuid", $"'{subsection}'");
            }
        }
        foreach (MigrationCapability capability in s_listed)
        {
            bool isOnHere = context.Capabilities.IsOn(capability), isOnThere = there.IsOn(capability);
            if (isOnHere == isOnThere) continue;
            throw new IncompatibleStateException($"capability '{capability.ToWireName()}' is {OnOff(isOnHere)} here and {OnOff(isOnThere)} at the source")
            {
                Section = f.Section, Offset = f.Position, Expected = OnOff(isOnHere), Found = OnOff(isOnThere),
                Hint = $"switch capability {capability.ToWireName()} on or off on both sides",
            };
        }
    }

    private static string OnOff(bool on) => on ? "on" : "off";

    /// <summary>Reads the list of those capabilities that change the stream's layout.</summary>
    private static MigrationCapabilities ReadCapabilities(QemuFileReader f)
    {
        MigrationCapabilities on = MigrationCapabilities.None;
        uint count = f.ReadUInt32();
        if (count > WireLimits.Capabilities) throw new StreamLimitException($"{count} capabilities are over {WireLimits.Capabilities} (WireLimits.Capabilities)");
        for (uint i = 0; i < count; i++)
        {
            string name = f.ReadCountedString();
            if (!MigrationCapabilityNames.TryParse(name, out MigrationCapability capability)) throw f.Bad("capability", "a known name", $"'{name}'");
            on = on.With(capability);
        }
        return on;
    }

    private static void CheckUuid(QemuFileReader f, MachineIdentity machine, LoadContext context)
    {
        Span<byte> bytes = stackalloc byte[16];
        f.Read(bytes);
        var uuid = new Guid(bytes, bigEndian: true);
        if (machine.Uuid == uuid || (machine.Uuid == Guid.Empty && !context.Capabilities.IsOn(MigrationCapability.ValidateUuid))) return;
        throw new IncompatibleStateException($"UUID differs: {machine.Uuid} here, {uuid} in the stream")
        {
            Section = f.Section, Offset = f.Position, Expected = machine.Uuid.ToString(), Found = uuid.ToString(), Hint = "start both sides with the same --uuid",
        };
    }

    private static bool TryReadSubsection(QemuFileReader f, out string name)
    {
        name = string.Empty;
        if (f.Peek(1) is not [(byte)SectionType.Subsection]) return false;
        f.ReadByte();
        name = f.ReadCountedString();
        return true;
    }
}
