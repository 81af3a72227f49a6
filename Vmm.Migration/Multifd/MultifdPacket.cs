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
    /// <summary>The pages are compressed by zlib.</summary>
    Zlib = 0x02,
    /// <summary>The pages are compressed by zstd.</summary>
    Zstd = 0x04,
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

    /// <summary>Writes a packet's header with the places of pages of one block.</summary>
    /// <param name="header"><see cref="HeaderBytes"/> bytes.</param>
    /// <param name="block">The block.</param>
    /// <param name="normal">Indexes of pages whose content follows.</param>
    /// <param name="zero">Indexes of zero pages.</param>
    /// <param name="method">How the content is compressed.</param>
    /// <param name="payloadBytes">Bytes that follow.</param>
    /// <param name="number">Number of the packet over all channels.</param>
    internal static void WritePages(Span<byte> header, RamBlock block, ReadOnlySpan<long> normal, ReadOnlySpan<long> zero, MultifdFlags method, int payloadBytes, ulong number)
    {
        Begin(header, method);
        BinaryPrimitives.WriteUInt32BigEndian(header[12..], PagesAllocated);
        BinaryPrimitives.WriteUInt32BigEndian(header[16..], (uint)normal.Length);
        BinaryPrimitives.WriteUInt32BigEndian(header[20..], (uint)payloadBytes);
        BinaryPrimitives.WriteUInt64BigEndian(header[24..], number);
        BinaryPrimitives.WriteUInt32BigEndian(header[32..], (uint)zero.Length);
        header[36..OffsetsOffset].Clear();
        Encoding.ASCII.GetBytes(block.Name, header.Slice(NameOffset, NameBytes - 1));
        Span<byte> offsets = header[OffsetsOffset..HeaderBytes];
        foreach (long page in normal) Add(ref offsets, page);
        foreach (long page in zero) Add(ref offsets, page);
        offsets.Clear();

        static void Add(ref Span<byte> offsets, long page)
        {
            BinaryPrimitives.WriteUInt64BigEndian(offsets, (ulong)page * RamBlock.PageSize);
            offsets = offsets[8..];
        }
    }

    /// <summary>Writes a SYNC, which has no pages.</summary>
    internal static void WriteSync(Span<byte> header, ulong number)
    {
        header[..HeaderBytes].Clear();
        Begin(header, MultifdFlags.Sync);
        BinaryPrimitives.WriteUInt64BigEndian(header[24..], number);
    }

    /// <summary>Writes the header in front of a buffer of device state: <see cref="StateHeaderBytes"/> bytes.</summary>
    internal static void WriteState(Span<byte> header, string idStr, int instance, int lengthBytes)
    {
        header[..StateHeaderBytes].Clear();
        Begin(header, MultifdFlags.DeviceState);
        Encoding.ASCII.GetBytes(idStr, header.Slice(12, NameBytes - 1));
        BinaryPrimitives.WriteInt32BigEndian(header[268..], instance);
        BinaryPrimitives.WriteInt32BigEndian(header[272..], lengthBytes);
    }

    private static void Begin(Span<byte> bytes, MultifdFlags? flags)
    {
        BinaryPrimitives.WriteUInt32BigEndian(bytes, Magic);
        BinaryPrimitives.WriteUInt32BigEndian(bytes[4..], Version);
        if (flags is { } f) BinaryPrimitives.WriteUInt32BigEndian(bytes[8..], (uint)f);
    }
}
