using System.Buffers.Binary;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>
/// The 16 bytes before every message, little-endian (vfio-user 1):
/// <c>u16 id, u16 command, u32 size, u32 flags (bits 0-3 type, 4 no-reply, 5 error), u32 errno</c>.
/// </summary>
/// <param name="Id">Chosen by the sender of the command, echoed in the reply.</param>
/// <param name="Command">Command.</param>
/// <param name="SizeBytes">Whole message, this header included.</param>
/// <param name="Flags">Type and bits.</param>
/// <param name="Errno">Of an error reply.</param>
internal readonly record struct VfioUserHeader(ushort Id, VfioUserCommand Command, uint SizeBytes, uint Flags, Errno Errno)
{
    /// <summary>Bytes of a header.</summary>
    public const int Length = 16;

    /// <summary>Type field: command 0, reply 1.</summary>
    public const uint TypeMask = 0xf;
    /// <summary>The message is a reply.</summary>
    public const uint Reply = 1;
    /// <summary>The sender wants no reply, not even an error.</summary>
    public const uint NoReply = 0x10;
    /// <summary>The reply is an error: header only.</summary>
    public const uint Error = 0x20;

    /// <summary>Type is reply.</summary>
    public bool IsReply => (Flags & TypeMask) == Reply;

    /// <summary>Type is command.</summary>
    public bool IsCommand => (Flags & TypeMask) == 0;

    /// <summary>An error reply.</summary>
    public bool IsError => (Flags & Error) != 0;

    /// <summary>No reply wanted.</summary>
    public bool WantsNoReply => (Flags & NoReply) != 0;

    /// <summary>Reads a header; nothing is checked.</summary>
    /// <returns>The header.</returns>
    public static VfioUserHeader Read(ReadOnlySpan<byte> bytes) => new(
        BinaryPrimitives.ReadUInt16LittleEndian(bytes), (VfioUserCommand)BinaryPrimitives.ReadUInt16LittleEndian(bytes[2..]),
        BinaryPrimitives.ReadUInt32LittleEndian(bytes[4..]), BinaryPrimitives.ReadUInt32LittleEndian(bytes[8..]),
        (Errno)BinaryPrimitives.ReadInt32LittleEndian(bytes[12..]));

    /// <summary>Writes the header.</summary>
    /// <param name="bytes">At least 16 bytes.</param>
    public void Write(Span<byte> bytes)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(bytes, Id);
        BinaryPrimitives.WriteUInt16LittleEndian(bytes[2..], (ushort)Command);
        BinaryPrimitives.WriteUInt32LittleEndian(bytes[4..], SizeBytes);
        BinaryPrimitives.WriteUInt32LittleEndian(bytes[8..], Flags);
        BinaryPrimitives.WriteInt32LittleEndian(bytes[12..], (int)Errno);
    }
}
