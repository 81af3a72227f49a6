using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Stream;

/// <summary>
/// Reads and carries out the commands of an incoming stream (stream 6.1; QEMU: <c>loadvm_process_command</c>). One thread.
/// </summary>
/// <param name="f">The stream.</param>
/// <param name="openReturnPath">Opens the return path; null for a stream that cannot have one, such as a snapshot, where commands that need it are refused.</param>
internal sealed class CommandReader(QemuFileReader f, Func<ReturnPathWriter>? openReturnPath)
{
    private bool _isInPackage;

    /// <summary>Reads the sections of a package; set before the first command is read.</summary>
    internal LoadStream? Sections { get; set; }

    /// <summary>The open return path, or null.</summary>
    internal ReturnPathWriter? ReturnPath { get; private set; }

    /// <summary>True when the source has offered a final word (<see cref="FinalWord"/>).</summary>
    internal bool SourceHasFinalWord { get; private set; }

    /// <summary>Called when the return path has been opened.</summary>
    internal Action? Opened { get; init; }

    /// <summary>
    /// Reads the commands before the first section. They open the return path, so that a device that then refuses to begin can tell the source why. (QEMU sets
    /// its devices up first, and the source learns only that the connection ended.)
    /// </summary>
    internal void ReadLeading()
    {
        while (f.Peek(1) is [(byte)SectionType.Command])
        {
            f.ReadByte();
            Read();
        }
    }

    /// <summary>Reads one command after its type byte: be16 command, be16 length, payload.</summary>
    internal void Read()
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
        if (expected >= 0 && length != expected) throw f.Bad($"length of command {command}", expected.ToString(), length.ToString(), f.Position - 2);
        switch (command)
        {
            case MigCommand.OpenReturnPath:
                // A second one is ignored, as in QEMU (stream 1.7).
                if (ReturnPath is not null) break;
                ReturnPath = openReturnPath?.Invoke() ?? throw f.Bad("return path", "a channel that goes both ways", f.Channel.Name);
                Opened?.Invoke();
                break;
            case MigCommand.Ping:
                uint value = f.ReadUInt32();
                SourceHasFinalWord |= value == FinalWord.Offer;
                (ReturnPath ?? throw f.Bad("PING", "an open return path", "none")).SendPong(value);
                break;
            case MigCommand.SwitchoverStart:
                Sections!.OnSwitchover?.Invoke();
                Sections.SwitchoverStart();
                break;
            case MigCommand.PostcopyAdvise when length == 0:
                break; // Without payload it belongs to capability dirty-bitmaps, and there is nothing to do.
            case MigCommand.Packaged:
                ReadPackage();
                break;
            case MigCommand.PostcopyAdvise or MigCommand.PostcopyListen or MigCommand.PostcopyRun or MigCommand.PostcopyRamDiscard
                or MigCommand.PostcopyResume or MigCommand.RecvBitmap:
                throw new IncompatibleStateException($"offset {f.Position - 4}: the source uses postcopy (command {command}), which is not implemented in this version of vmm")
                {
                    Section = f.Section, Offset = f.Position - 4, Found = command.ToString(), Hint = "switch capability postcopy-ram off on the source",
                };
            default:
                throw f.Bad("command", "a known command", $"{(ushort)command} of {length} bytes", f.Position - 4);
        }
    }

    /// <summary>Reads the source's final word behind the stream.</summary>
    /// <returns>Released or withdrawn.</returns>
    internal MigCommand ReadFinalWord()
    {
        f.Section = "final word";
        byte type = f.ReadByte();
        var command = (MigCommand)f.ReadUInt16();
        int length = f.ReadUInt16();
        if (type != (byte)SectionType.Command || length != 0 || command is not (MigCommand.VmmReleased or MigCommand.VmmWithdrawn))
            throw f.Bad("final word", "command VmmReleased or VmmWithdrawn", $"type {type}, command {(ushort)command} of {length} bytes");
        return command;
    }

    /// <summary>Reads the sections of a package, which is a stream inside the stream. QEMU never puts one package into another.</summary>
    private void ReadPackage()
    {
        uint length = f.ReadUInt32();
        if (length > WireLimits.PackagedBytes) throw f.Over($"a package of {length} bytes", WireLimits.PackagedBytes, nameof(WireLimits.PackagedBytes));
        if (_isInPackage) throw f.Bad("command in a package", "no other package", "PACKAGED");
        _isInPackage = true;
        long end = f.Position + length;
        while (f.Position < end && Sections!.ReadSection()) { }
        if (f.Position != end) throw f.Bad("end of package", $"offset {end}", f.Position.ToString());
        _isInPackage = false;
    }
}
