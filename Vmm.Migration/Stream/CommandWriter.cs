using System.Buffers.Binary;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Stream;

/// <summary>Writes commands: <c>u8 8 COMMAND, be16 command, be16 length, payload</c> (stream 6.1; QEMU: <c>qemu_savevm_command_send</c>).</summary>
internal static class CommandWriter
{
    internal static void WriteCommand(this QemuFileWriter f, MigCommand command, ReadOnlySpan<byte> payload = default)
    {
        f.WriteByte((byte)SectionType.Command);
        f.WriteUInt16((ushort)command);
        f.WriteUInt16((ushort)payload.Length);
        f.Write(payload);
    }

    internal static void WritePing(this QemuFileWriter f, uint value)
    {
        Span<byte> payload = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(payload, value);
        f.WriteCommand(MigCommand.Ping, payload);
    }
}
