using System.Buffers.Binary;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>Little-endian fields by offset.</summary>
internal static class LittleEndian
{
    internal static uint U32(ReadOnlySpan<byte> b, int at) => BinaryPrimitives.ReadUInt32LittleEndian(b[at..]);

    internal static ulong U64(ReadOnlySpan<byte> b, int at) => BinaryPrimitives.ReadUInt64LittleEndian(b[at..]);

    internal static void U32(Span<byte> b, int at, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(b[at..], value);

    internal static void U64(Span<byte> b, int at, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(b[at..], value);
}
