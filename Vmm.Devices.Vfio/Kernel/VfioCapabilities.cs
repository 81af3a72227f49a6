using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// The capability chain behind an info structure: <c>u16 id, u16 version, u32 next</c>, next counted from the start of the structure, 0 ends
/// it (vfio-migration 1.1). Every offset is checked before it is used.
/// </summary>
/// <param name="info">The whole answer, structure first.</param>
/// <param name="owner">For errors, e.g. <c>0000:01:00.0: region 2</c>.</param>
internal readonly struct VfioCapabilities(byte[] info, string owner)
{
    private const int HeaderBytes = 8, AreaBytes = 16;
    private const ulong PageBytes = 4096;

    /// <summary>Finds a capability.</summary>
    /// <param name="firstOffset">The structure's <c>cap_offset</c>.</param>
    /// <param name="id">Id of the capability.</param>
    /// <param name="sizeBytes">Size of its structure, header included.</param>
    /// <returns>The bytes from the capability to the end of the answer; empty when there is no such capability.</returns>
    /// <exception cref="VfioException">An offset points outside, or the chain has no end.</exception>
    internal ReadOnlySpan<byte> Find(uint firstOffset, ushort id, int sizeBytes)
    {
        // More links than the answer has room for mean that the chain is a loop.
        int links = info.Length / HeaderBytes;
        for (uint at = firstOffset; at != 0;)
        {
            if (at > info.Length - HeaderBytes || links-- == 0) throw Malformed($"chain leads to offset {at} of {info.Length} bytes");
            VfioUapi.InfoCapHeader header = Ioctl.Read<VfioUapi.InfoCapHeader>(info.AsSpan((int)at));
            if (header.Id == id) return info.Length - at >= sizeBytes ? info.AsSpan((int)at) : throw Malformed($"{id} at offset {at} is cut off at {info.Length} bytes");
            at = header.Next;
        }
        return default;
    }

    /// <summary>Reads a list of 16-byte pairs that ends a capability.</summary>
    /// <param name="capability">From <see cref="Find"/>.</param>
    /// <param name="headBytes">Where the list begins.</param>
    /// <param name="count">Number of pairs.</param>
    /// <returns>The pairs.</returns>
    /// <exception cref="VfioException">They do not fit.</exception>
    internal (ulong First, ulong Second)[] Pairs(ReadOnlySpan<byte> capability, int headBytes, uint count)
    {
        if (count > (capability.Length - headBytes) / AreaBytes) throw Malformed($"{count} entries do not fit into {capability.Length} bytes");
        var pairs = new (ulong, ulong)[count];
        for (int i = 0; i < pairs.Length; i++)
        {
            ReadOnlySpan<byte> at = capability[(headBytes + (i * AreaBytes))..];
            pairs[i] = (BinaryPrimitives.ReadUInt64LittleEndian(at), BinaryPrimitives.ReadUInt64LittleEndian(at[8..]));
        }
        return pairs;
    }

    /// <summary>Decodes a region's info (vfio-migration 1.5).</summary>
    /// <returns>The info. Only whole pages are offered for mapping; a BAR smaller than a page is accessed by calls.</returns>
    /// <exception cref="VfioException">The capabilities are malformed.</exception>
    internal VfioRegionInfo Region(in VfioUapi.RegionInfo region)
    {
        uint caps = (region.Flags & VfioUapi.VFIO_REGION_INFO_FLAG_CAPS) != 0 ? region.CapOffset : 0;
        var flags = (VfioRegionFlags)region.Flags & (VfioRegionFlags.Read | VfioRegionFlags.Write | VfioRegionFlags.Mmap);
        ReadOnlySpan<byte> type = Find(caps, VfioUapi.VFIO_REGION_INFO_CAP_TYPE, 16);
        return new VfioRegionInfo
        {
            Index = region.Index,
            Flags = flags,
            SizeBytes = region.Size,
            Areas = flags.HasFlag(VfioRegionFlags.Mmap) ? Areas(caps, region.Size) : [],
            Type = type.IsEmpty ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(type[8..]),
            Subtype = type.IsEmpty ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(type[12..]),
            IsMsixMappable = !Find(caps, VfioUapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, HeaderBytes).IsEmpty,
        };
    }

    private List<VfioRegionArea> Areas(uint caps, ulong regionBytes)
    {
        ReadOnlySpan<byte> sparse = Find(caps, VfioUapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP, 16);
        (ulong Offset, ulong Size)[] found = sparse.IsEmpty ? [(0, regionBytes)] : Pairs(sparse, 16, BinaryPrimitives.ReadUInt32LittleEndian(sparse[8..]));
        var areas = new List<VfioRegionArea>(found.Length);
        foreach ((ulong offset, ulong size) in found)
        {
            if (offset > regionBytes || size > regionBytes - offset) throw Malformed($"area 0x{offset:x}+0x{size:x} is outside a region of 0x{regionBytes:x} bytes");
            if (size > 0 && (offset | size) % PageBytes == 0) areas.Add(new VfioRegionArea(offset, size));
        }
        return areas;
    }

    private VfioException Malformed(string what) => new($"{owner}: the kernel's capability {what}", Errno.EPROTO);
}
