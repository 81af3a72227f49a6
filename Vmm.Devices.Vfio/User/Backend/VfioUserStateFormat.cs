using System.Text;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// The framing of a hosted device's state (vfio-user S-37, S-41). A sequence of records, all little-endian, each with a head of 16 bytes:
/// <code>
/// u32 kind, u32 argument, u64 length, then length bytes
/// 'VMMH'  argument: format version 1   u32 flags (1 full snapshot), u32 0, u64 limit, type name in ASCII (1 to 64 bytes)
/// 'VMMS'  argument: section id         the section; only after a header with flag 1
/// 'VMMP'  argument: section id         a preview of a running device; carries nothing that the snapshot does not repeat
/// 'VMME'  argument: CRC-32C of every byte since the last header record's first; length 0; the end
/// </code>
/// PRE_COPY gives a header without flag and previews, STOP_COPY a header with it, sections and the end: a reader that has both, and one that
/// was given the second part alone, restore the same.
/// </summary>
internal static class VfioUserStateFormat
{
    internal const int HeadBytes = 16, HeaderFixedBytes = 16;
    internal const uint Version = 1, FullSnapshot = 1;
    internal const uint Header = 0x484d4d56, Section = 0x534d4d56, Preview = 0x504d4d56, End = 0x454d4d56;

    internal static void WriteHead(Span<byte> into, uint kind, uint argument, ulong length)
    {
        LittleEndian.U32(into, 0, kind);
        LittleEndian.U32(into, 4, argument);
        LittleEndian.U64(into, 8, length);
    }

    internal static byte[] HeaderRecord(string typeName, ulong limitBytes, bool isFull)
    {
        byte[] name = Encoding.ASCII.GetBytes(typeName);
        byte[] record = new byte[HeadBytes + HeaderFixedBytes + name.Length];
        WriteHead(record, Header, Version, (ulong)(HeaderFixedBytes + name.Length));
        LittleEndian.U32(record, HeadBytes, isFull ? FullSnapshot : 0);
        LittleEndian.U64(record, HeadBytes + 8, limitBytes);
        name.CopyTo(record, HeadBytes + HeaderFixedBytes);
        return record;
    }
}
