using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Multifd;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Incoming;

/// <summary>
/// Reads the framing of an incoming stream and gives each body to its handler (spec 1; QEMU: <c>qemu_loadvm_state_main</c>). One thread.
/// Device sections load under the BQL, iterables without it.
/// </summary>
/// <param name="vm">The machine.</param>
/// <param name="f">The stream.</param>
/// <param name="compat">Framing choices; must equal the sender's.</param>
/// <param name="validateUuid">Capability validate-uuid.</param>
internal sealed class SectionReader(MachineView vm, QemuFileReader f, MigrationCompat compat, bool validateUuid)
{
    private readonly Dictionary<uint, SaveVmEntry> _bound = [];
    private readonly List<SaveVmEntry> _setUp = [];
    private readonly HashSet<SaveVmEntry> _begun = [];
    private int _acksMissing;
    private bool _isSetUp;

    /// <summary>Opens the return path; null where none can be had.</summary>
    internal Func<ReturnPathWriter>? OpenReturnPath { get; init; }

    /// <summary>The open return path, or null.</summary>
    internal ReturnPathWriter? ReturnPath { get; private set; }

    /// <summary>Devices may take their final state from channels of multifd.</summary>
    internal bool UsesLoadBuffers { get; init; }

    /// <summary>Capability switchover-ack.</summary>
    internal bool SwitchoverAck { get; init; }

    /// <summary>Called before the first section that a stopped source sends.</summary>
    internal Action? OnSwitchover { get; init; }

    /// <summary>Header and configuration (spec 1.1, 1.2).</summary>
    internal void ReadHeader()
    {
        f.Section = "header";
        uint magic = f.ReadUInt32();
        if (magic == MultifdPacket.Magic) throw ChannelCount.Refusal(1, expected: 0);
        if (magic != StreamConstants.Magic)
            throw new StreamFormatException($"not a migration stream: it starts with 0x{magic:x8}, expected 0x{StreamConstants.Magic:x8} ('QEVM')")
            {
                Section = f.Section, Offset = 0, Expected = "QEVM", Found = $"0x{magic:x8}",
            };
        uint version = f.ReadUInt32();
        if (version == StreamConstants.ObsoleteVersion) throw f.Bad("stream version", "3", "2, which is obsolete");
        if (version != StreamConstants.Version) throw f.Bad("stream version", "3", version.ToString());
        if (compat.SendConfiguration) ReadConfiguration();
    }

    /// <summary>
    /// Commands before the first section, which open the return path: a device that then refuses to begin can tell the source why. (QEMU sets
    /// its devices up first, and the source learns only that the connection ended.)
    /// </summary>
    internal void ReadLeadingCommands()
    {
        while (f.Peek(1) is [(byte)SectionType.Command])
        {
            f.ReadByte();
            ReadCommand();
        }
    }

    /// <summary>Tells every handler that a load begins (QEMU: <c>load_setup</c>). Takes the BQL.</summary>
    internal void LoadSetup()
    {
        using (vm.Bql.Acquire())
        {
            foreach (SaveVmEntry entry in vm.SaveVm.Entries())
            {
                if (entry.Handlers?.Load is not { } load || entry.Handlers.IsActive is { } active && !active()) continue;
                _setUp.Add(entry);
                if (entry.Handlers.LoadBuffer is { } buffers) buffers.UsesLoadBuffers = UsesLoadBuffers;
                load.LoadSetup(f);
                if (entry.Handlers.SwitchoverAck is not { } ack) continue;
                ack.SwitchoverApproved = SwitchoverAck ? Approved : null;
                if (SwitchoverAck && ack.SwitchoverAckNeeded) _acksMissing++;
            }
        }
        _isSetUp = true;
        ApproveWithoutDevices();
    }

    private void ApproveWithoutDevices()
    {
        if (SwitchoverAck && compat.LegacySwitchoverAck && _isSetUp && _acksMissing == 0) ReturnPath?.SendSwitchoverAck();
    }

    /// <summary>A device has loaded its first data: each is acknowledged, or with older peers the last one only (spec vfio-migration 3.6).</summary>
    private void Approved()
    {
        if (compat.LegacySwitchoverAck && --_acksMissing != 0) return;
        ReturnPath?.SendSwitchoverAck();
    }

    /// <summary>Ends every handler's part (QEMU: <c>load_cleanup</c>). Takes the BQL.</summary>
    internal void LoadCleanup()
    {
        using (vm.Bql.Acquire())
        {
            foreach (SaveVmEntry entry in _setUp)
            {
                entry.Handlers!.Load!.LoadCleanup();
                if (entry.Handlers.SwitchoverAck is { } ack) ack.SwitchoverApproved = null;
            }
        }
        _setUp.Clear();
    }

    /// <summary>Sections and commands up to EOF.</summary>
    internal void ReadSections()
    {
        while (true)
        {
            f.Section = "framing";
            var type = (SectionType)f.ReadByte();
            switch (type)
            {
                case SectionType.Eof:
                    // What was begun and not ended is half a state.
                    if (_begun.FirstOrDefault() is { } half) throw f.Bad("end of the stream", $"an END section of '{half}' first", "EOF");
                    return;
                case SectionType.Start or SectionType.Full: ReadFirst(type); break;
                case SectionType.Part or SectionType.End: ReadNext(type); break;
                case SectionType.Command: ReadCommand(); break;
                default: throw f.Bad("section type", "START, PART, END, FULL, COMMAND or EOF", $"0x{(byte)type:x2}");
            }
        }
    }

    /// <summary>VMDESC after EOF; read and dropped. A sender that just ends is accepted (spec 1.6).</summary>
    internal void SkipVmDescription()
    {
        f.Section = "vmdesc";
        if (compat.SuppressVmDesc || f.Peek(1) is not [(byte)SectionType.VmDescription]) return;
        f.ReadByte();
        uint length = f.ReadUInt32();
        if (length > WireLimits.VmDescBytes) throw new StreamLimitException($"vmdesc of {length} bytes is over {WireLimits.VmDescBytes} (WireLimits.VmDescBytes)");
        f.Skip(length);
    }

    private void ReadConfiguration()
    {
        f.Section = "configuration";
        byte type = f.ReadByte();
        if (type != (byte)SectionType.Configuration) throw f.Bad("section type", "CONFIGURATION (0x07)", $"0x{type:x2}");
        uint length = f.ReadUInt32();
        if (length > WireLimits.MachineNameBytes) throw new StreamLimitException($"machine name of {length} bytes is over {WireLimits.MachineNameBytes} (WireLimits.MachineNameBytes)");
        byte[] name = new byte[length];
        f.Read(name);
        string text = Encoding.Latin1.GetString(name);
        // QEMU compares as many bytes as were sent, so a prefix passes (spec 1.2).
        if (!vm.Machine.StartsWith(text, StringComparison.Ordinal))
            throw new IncompatibleStateException($"machine type differs: '{vm.Machine}' here, '{text}' in the stream")
            {
                Section = f.Section, Offset = f.Position, Expected = vm.Machine, Found = text, Hint = "start both sides with the same --machine",
            };
        while (TryReadSubsection(out string subsection))
        {
            uint version = f.ReadUInt32();
            if ((byte)version > 1) throw f.Bad($"version of subsection '{subsection}'", "1", version.ToString());
            switch (subsection)
            {
                case "configuration/target-page-bits":
                    uint bits = f.ReadUInt32();
                    if (bits != 12) throw f.Bad("target page bits", "12", bits.ToString());
                    break;
                case "configuration/capabilities":
                    ReadCapabilities();
                    break;
                case "configuration/uuid":
                    CheckUuid(ReadUuid());
                    break;
                default:
                    throw f.Bad("subsection of configuration", "target-page-bits, capabilities or uuid", $"'{subsection}'");
            }
        }
    }

    private void ReadCapabilities()
    {
        uint count = f.ReadUInt32();
        if (count > WireLimits.Capabilities) throw new StreamLimitException($"{count} capabilities are over {WireLimits.Capabilities} (WireLimits.Capabilities)");
        for (uint i = 0; i < count; i++)
        {
            string name = f.ReadCountedString();
            if (!MigrationCapabilityNames.TryParse(name, out MigrationCapability capability)) throw f.Bad("capability", "a known name", $"'{name}'");
            // Of the known ones QEMU validates only these two; neither is implemented here, so the stream cannot be read.
            if (capability is MigrationCapability.XIgnoreShared or MigrationCapability.MappedRam)
                throw new IncompatibleStateException($"the stream uses capability '{name}', which is off here and not implemented in this version of vmm")
                {
                    Section = f.Section, Offset = f.Position, Expected = "off", Found = "on",
                };
        }
    }

    private Guid ReadUuid()
    {
        Span<byte> uuid = stackalloc byte[16];
        f.Read(uuid);
        return new Guid(uuid, bigEndian: true);
    }

    private void CheckUuid(Guid uuid)
    {
        if (vm.Uuid == uuid || (vm.Uuid == Guid.Empty && !validateUuid)) return;
        throw new IncompatibleStateException($"UUID differs: {vm.Uuid} here, {uuid} in the stream")
        {
            Section = f.Section, Offset = f.Position, Expected = vm.Uuid.ToString(), Found = uuid.ToString(), Hint = "start both sides with the same --uuid",
        };
    }

    private bool TryReadSubsection(out string name)
    {
        name = string.Empty;
        if (f.Peek(1) is not [(byte)SectionType.Subsection]) return false;
        f.ReadByte();
        name = f.ReadCountedString();
        return true;
    }

    /// <summary>START or FULL: u32 id, cs idstr, u32 instance, u32 version, body, footer.</summary>
    private void ReadFirst(SectionType type)
    {
        uint id = f.ReadUInt32();
        string idStr = f.ReadCountedString();
        uint instance = f.ReadUInt32();
        uint version = f.ReadUInt32();
        f.Section = $"{idStr}/{instance}";
        SaveVmEntry entry = vm.SaveVm.Find(idStr, (int)instance)
            ?? throw new IncompatibleStateException($"unknown section '{idStr}' instance {instance}: this machine has no such device")
            {
                Section = f.Section, Offset = f.Position, Found = f.Section, Hint = $"give both sides the same devices; here: {string.Join(", ", vm.SaveVm.Entries())}",
            };
        if (version > entry.VersionId)
            throw Version(entry, version, $"version {version} is newer than {entry.VersionId}");
        if (version < entry.MinimumVersionId)
            throw Version(entry, version, $"version {version} is older than {entry.MinimumVersionId}");
        if (_bound.TryGetValue(id, out SaveVmEntry? other) && other != entry)
            throw f.Bad("section id", $"an id that '{other}' does not use", id.ToString());
        _bound[id] = entry;
        if (type == SectionType.Start) _begun.Add(entry);
        Load(entry, type, (int)version);
        ReadFooter(id);
    }

    /// <summary>PART or END: u32 id, body, footer.</summary>
    private void ReadNext(SectionType type)
    {
        uint id = f.ReadUInt32();
        if (!_bound.TryGetValue(id, out SaveVmEntry? entry)) throw f.Bad("section id", "the id of a START section", id.ToString());
        f.Section = entry.ToString();
        if (type == SectionType.End) OnSwitchover?.Invoke();
        Load(entry, type, entry.VersionId);
        ReadFooter(id);
        if (type == SectionType.End) _begun.Remove(entry);
    }

    private void Load(SaveVmEntry entry, SectionType type, int version)
    {
        if (type == SectionType.Full)
        {
            OnSwitchover?.Invoke();
            using (vm.Bql.Acquire()) Body(entry, version);
        }
        else
        {
            Body(entry, version);
        }
    }

    private void Body(SaveVmEntry entry, int version)
    {
        try
        {
            if (entry.VmState is { } state) state.Load(f, version);
            else if (entry.Handlers?.Load is { } load) load.LoadState(f, version);
            else throw new IncompatibleStateException($"section '{entry}' cannot be loaded here") { Section = f.Section, Offset = f.Position };
        }
        catch (Exception e) when (e is not (VmmException or OperationCanceledException))
        {
            throw new DeviceStateException($"device '{entry.IdStr}' failed to load at offset {f.Position}: {e.Message}", e);
        }
    }

    private void ReadFooter(uint id)
    {
        if (!compat.SendSectionFooter) return;
        byte mark = f.ReadByte();
        if (mark != (byte)SectionType.Footer) throw f.Bad("section footer", "0x7e", $"0x{mark:x2}");
        uint found = f.ReadUInt32();
        if (found != id) throw f.Bad("section id in footer", id.ToString(), found.ToString());
    }

    /// <summary>COMMAND: u16 command, u16 length, payload (spec 6.1).</summary>
    private void ReadCommand()
    {
        f.Section = "command";
        var command = (MigCommand)f.ReadUInt16();
        int length = f.ReadUInt16();
        int expected = command switch
        {
            MigCommand.OpenReturnPath or MigCommand.SwitchoverStart or MigCommand.PostcopyListen or MigCommand.PostcopyRun or MigCommand.PostcopyResume => 0,
            MigCommand.Ping or MigCommand.Packaged => 4,
            _ => -1,
        };
        if (expected >= 0 && length != expected) throw f.Bad($"length of command {command}", expected.ToString(), length.ToString());
        switch (command)
        {
            case MigCommand.OpenReturnPath:
                // A second one is ignored, as in QEMU (spec 1.7).
                if (ReturnPath is not null) break;
                ReturnPath = OpenReturnPath?.Invoke() ?? throw f.Bad("return path", "a channel that goes both ways", f.Channel.Name);
                ApproveWithoutDevices();
                break;
            case MigCommand.Ping:
                uint value = f.ReadUInt32();
                (ReturnPath ?? throw f.Bad("PING", "an open return path", "none")).SendPong(value);
                break;
            case MigCommand.SwitchoverStart:
                OnSwitchover?.Invoke();
                using (vm.Bql.Acquire())
                    foreach (SaveVmEntry entry in vm.SaveVm.Entries()) entry.Handlers?.LoadBuffer?.SwitchoverStart();
                break;
            case MigCommand.PostcopyAdvise when length == 0:
                break; // dirty-bitmaps only; nothing follows from it here.
            case MigCommand.Packaged:
                ReadPackage();
                break;
            case MigCommand.PostcopyAdvise or MigCommand.PostcopyListen or MigCommand.PostcopyRun or MigCommand.PostcopyRamDiscard
                or MigCommand.PostcopyResume or MigCommand.RecvBitmap:
                throw new IncompatibleStateException($"the source uses postcopy (command {command}), which is not implemented in this version of vmm")
                {
                    Section = f.Section, Offset = f.Position, Hint = "switch capability postcopy-ram off on the source",
                };
            default:
                throw f.Bad("command", "a known command", $"{(ushort)command} of {length} bytes");
        }
    }

    /// <summary>A package is a stream of its own inside the stream; it is read in place, as it carries the same sections.</summary>
    private void ReadPackage()
    {
        uint length = f.ReadUInt32();
        if (length > WireLimits.PackagedBytes) throw new StreamLimitException($"package of {length} bytes is over {WireLimits.PackagedBytes} (WireLimits.PackagedBytes)");
        long end = f.Position + length;
        while (f.Position < end)
        {
            var type = (SectionType)f.ReadByte();
            if (type == SectionType.Eof) break;
            switch (type)
            {
                case SectionType.Start or SectionType.Full: ReadFirst(type); break;
                case SectionType.Part or SectionType.End: ReadNext(type); break;
                case SectionType.Command: ReadCommand(); break;
                default: throw f.Bad("section type in package", "a section or EOF", $"0x{(byte)type:x2}");
            }
        }
        if (f.Position != end) throw f.Bad("end of package", $"offset {end}", f.Position.ToString());
    }

    private IncompatibleStateException Version(SaveVmEntry entry, uint found, string why) => new($"section '{entry}': {why}, which this machine has")
    {
        Section = f.Section, Offset = f.Position, Expected = $"{entry.MinimumVersionId}..{entry.VersionId}", Found = found.ToString(),
    };
}
