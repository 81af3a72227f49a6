using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>One DMA_MAP: a piece of a RAM section.</summary>
/// <param name="Section">The section.</param>
/// <param name="Range">DMA addresses of the piece.</param>
/// <param name="Fd">The block's descriptor, which the server maps; null for DMA by messages.</param>
internal sealed record VfioUserMapping(GuestMemorySection Section, GuestRange Range, OwnedFd? Fd)
{
    /// <summary>Whether the server can write to the piece without a message.</summary>
    internal bool IsWritableByFd => Fd is not null && !Section.IsReadOnly;

    /// <summary>Offset in the block of an address of the piece.</summary>
    internal ulong BlockOffset(ulong address) => Section.OffsetBytes + (address - Section.Range.Start.Value);

    /// <summary>The part of a range that lies in this piece.</summary>
    internal bool Intersect(GuestRange range, out GuestRange part)
    {
        ulong start = Math.Max(range.Start.Value, Range.Start.Value), end = Math.Min(range.End, Range.End);
        part = start < end ? new GuestRange(new GuestAddress(start), end - start) : default;
        return start < end;
    }

    /// <summary>The request that maps it.</summary>
    internal VfioUserDmaMap ToMessage() => new(VfioUserDmaMap.Length,
        Section.IsReadOnly ? VfioUserDmaMap.FlagRead : VfioUserDmaMap.FlagRead | VfioUserDmaMap.FlagWrite,
        Fd is null ? 0 : BlockOffset(Range.Start.Value), Range.Start.Value, Range.LengthBytes);

    /// <summary>
    /// Cuts a section into pieces. The descriptor of a block that this process maps privately is not sent: through it, neither side would see what
    /// the other writes (vfio-user 10.1).
    /// </summary>
    internal static List<VfioUserMapping> Split(GuestMemorySection section, ulong maxBytes, bool canPassFds)
    {
        var pieces = new List<VfioUserMapping>();
        OwnedFd? fd = canPassFds && section.Block.IsShared ? section.Block.Fd : null;
        for (ulong at = 0; at < section.Range.LengthBytes; at += maxBytes)
            pieces.Add(new VfioUserMapping(section, new GuestRange(section.Range.Start + at, Math.Min(maxBytes, section.Range.LengthBytes - at)), fd));
        return pieces;
    }
}
