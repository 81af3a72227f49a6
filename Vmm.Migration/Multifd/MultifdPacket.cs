using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Memory;

namespace Vmm.Migration.Multifd;

/// <summary>Flags of a packet.</summary>
[Flags]
internal enum MultifdFlags : uint
{
    /// <summary>Nothing.</summary>
    None = 0,
    /// <summary>The receiver of the channel waits after this packet until the main channel has come to the same point.</summary>
    Sync = 1,
    /// <summary>Bits of the compression method.</summary>
    MethodMask = 0x3e,
    /// <summary>A buffer of device state follows, no pages.</summary>
    DeviceState = 0x40,
}

/// <summary>
/// The bytes on channels of multifd, big-endian (stream 4.1, 4.2, 4.6; QEMU: <c>MultiFDInit_t</c>, <c>MultiFDPacket_t</c>,
/// <c>MultiFDPacketDeviceState_t</c>).
/// </summary>
internal static class MultifdPacket
{
    /// <summary>Channels beside the main one: the default of <c>multifd-channels</c>, the only value that is implemented.</summary>
    internal const int Channels = 2;

    internal const uint Magic = 0x11223344, Version = 1;

    /// <summary>u32 magic, u32 version, uuid[16], u8 id, 39 zeros.</summary>
    internal const int PreambleBytes = 64;

    internal const int PreambleIdOffset = 24;

    /// <summary>Pages that one packet holds: 512 KiB.</summary>
    internal const int PagesAllocated = 128;

    internal const int NameBytes = 256;

    private const int NameOffset = 64, OffsetsOffset = NameOffset + NameBytes;

    /// <summary>
    /// u32 magic, version, flags, pages_alloc, normal_pages, next_packet_size; u64 packet_num; u32 zero_pages; 28 zeros; name[256];
    /// u64 offsets[128].
    /// </summary>
    internal const int HeaderBytes = OffsetsOffset + (8 * PagesAllocated);

    /// <summary>u32 magic, version, flags; idstr[256]; u32 instance_id, next_packet_size.</summary>
    internal const int StateHeaderBytes = 276;

    /// <summary>The first bytes of a channel.</summary>
    internal static byte[] Preamble(Guid uuid, byte id)
    {
        byte[] bytes = new byte[PreambleBytes];
        Begin(bytes, null);
        uuid.TryWriteBytes(bytes.AsSpan(8), bigEndian: true, out _);
        bytes[PreambleIdOffset] = id;
        return bytes;
    }

    /// <summary>A packet with data pages of one block; with null for the block, a SYNC without pages.</summary>
    internal static byte[] Pages(RamBlock? block, ReadOnlySpan<long> pages, ulong number)
    {
        byte[] bytes = new byte[HeaderBytes];
        Begin(bytes, block is null ? MultifdFlags.Sync : MultifdFlags.None);
        BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan(24), number);
        if (block is null) return bytes;
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(12), PagesAllocated);
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(16), (uint)pages.Length);
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(20), (uint)(pages.Length * RamBlock.PageSize));
        Encoding.ASCII.GetBytes(block.Name, bytes.AsSpan(NameOffset, NameBytes - 1));
        for (int i = 0; i < pages.Length; i++) BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan(OffsetsOffset + (8 * i)), (ulong)pages[i] * RamBlock.PageSize);
        return bytes;
    }

    /// <summary>The header in front of a buffer of device state.</summary>
    internal static byte[] State(string idStr, int instance, int lengthBytes)
    {
        byte[] bytes = new byte[StateHeaderBytes];
        Begin(bytes, MultifdFlags.DeviceState);
        Encoding.ASCII.GetBytes(idStr, bytes.AsSpan(12, NameBytes - 1));
        BinaryPrimitives.WriteInt32BigEndian(bytes.AsSpan(268), instance);
        BinaryPrimitives.WriteInt32BigEndian(bytes.AsSpan(272), lengthBytes);
        return bytes;
    }

    private static void Begin(Span<byte> bytes, MultifdFlags? flags)
    {
        BinaryPrimitives.WriteUInt32BigEndian(bytes, Magic);
        BinaryPrimitives.WriteUInt32BigEndian(bytes[4..], Version);
        if (flags is { } f) BinaryPrimitives.WriteUInt32BigEndian(bytes[8..], (uint)f);
    }
}
