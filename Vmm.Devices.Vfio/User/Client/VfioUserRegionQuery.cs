using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>One region of a server: its info, and the descriptor that maps it.</summary>
/// <param name="Info">Checked info.</param>
/// <param name="Fd">Owned; null when nothing can be mapped.</param>
/// <param name="FdOffset">Offset of the region in the descriptor.</param>
internal sealed record VfioUserClientRegion(VfioRegionInfo Info, OwnedFd? Fd = null, ulong FdOffset = 0)
{
    /// <summary>Maps one area.</summary>
    /// <param name="area">One of the info's.</param>
    /// <param name="name">For errors.</param>
    /// <returns>Null when the descriptor cannot be mapped there; a file that is too short is refused, because an access would raise SIGBUS.</returns>
    internal MappedRegion? Map(VfioRegionArea area, string name)
    {
        if (Fd is null || !Info.Areas.Contains(area)) return null;
        ulong start = FdOffset + area.OffsetBytes;
        if (start % VfioUserLimits.PageBytes != 0 || Posix.Stat(Fd, out FileStatus stat) != Errno.None) return null;
        if (stat.IsRegularFile && (stat.SizeBytes < 0 || (ulong)stat.SizeBytes < start + area.SizeBytes)) return null;
        try
        {
            return MappedRegion.Map(Fd, area.SizeBytes, true, (long)start, $"vfio-user '{name}' region {Info.Index}", Info.Flags.HasFlag(VfioRegionFlags.Write));
        }
        catch (ChannelException)
        {
            return null; // Not a mappable descriptor; the region is then accessed by messages.
        }
    }
}

/// <summary>Asks a server for its regions (vfio-user 3.2) and checks sizes, capability chain and areas against bounds (vfio-user 14).</summary>
internal static class VfioUserRegionQuery
{
    private const ushort CapSparse = 1, CapType = 2, CapMsixMappable = 3;
    private const int CapHead = 8;

    /// <summary>Queries one region, with a second request when the first reply says that there is more.</summary>
    /// <param name="client">Connection.</param>
    /// <param name="index">Region.</param>
    /// <param name="noMmap">Ignore what could be mapped.</param>
    /// <returns>The region; of size 0 when the server refuses the index.</returns>
    /// <exception cref="VmmException">The connection ended, or the answer breaks a bound.</exception>
    internal static VfioUserClientRegion Query(VfioUserClient client, uint index, bool noMmap)
    {
        uint argsz = VfioUserRegionInfo.Length;
        for (int step = 0; ; step++)
        {
            using VfioUserExchange x = client.Begin();
            x.WantedFds = 1;
            new VfioUserRegionInfo(argsz, 0, index, 0, 0, 0).Write(x.Body(VfioUserRegionInfo.Length));
            Errno errno = x.Run(VfioUserCommand.DeviceGetRegionInfo, (int)argsz);
            if (errno == Errno.EINVAL) return new VfioUserClientRegion(new VfioRegionInfo { Index = index });
            if (errno != Errno.None) throw new VfioException($"vfio-user '{client.Name}': region {index} info: {Posix.Describe(errno)}", errno, client.Fault);
            if (!VfioUserRegionInfo.TryRead(x.Reply, out VfioUserRegionInfo head)) throw Broken(client, index, $"a reply of {x.Reply.Length} bytes");
            if (head.Index != index) throw Broken(client, index, $"the reply is about region {head.Index}");
            if (head.ArgSz > VfioUserLimits.ControlBytes) throw Broken(client, index, $"capabilities of {head.ArgSz} bytes");
            if (head.ArgSz > x.Reply.Length)
            {
                if (step > 0) throw Broken(client, index, $"the second reply has {x.Reply.Length} bytes and wants {head.ArgSz}");
                argsz = head.ArgSz;
                continue;
            }
            OwnedFd? fd = noMmap || x.ReplyFds.Count == 0 ? null : x.ReplyFds[0];
            VfioRegionInfo info = Parse(client, head, x.Reply, fd is not null);
            if (info.Areas.Count == 0) return new VfioUserClientRegion(info);
            x.ReplyFds.Clear();
            return new VfioUserClientRegion(info, fd, head.Offset);
        }
    }

    private static VfioRegionInfo Parse(VfioUserClient client, VfioUserRegionInfo head, ReadOnlySpan<byte> body, bool hasFd)
    {
        if (head.Size > long.MaxValue || head.Offset > long.MaxValue - head.Size) throw Broken(client, head.Index, $"size 0x{head.Size:x} at file offset 0x{head.Offset:x}");
        List<VfioRegionArea>? areas = null;
        uint type = 0, subtype = 0;
        bool msixMappable = false;
        uint next = (head.Flags & VfioUserRegionInfo.FlagCaps) != 0 ? head.CapOffset : 0;
        for (uint at = next, last = VfioUserRegionInfo.Length - 1; at != 0; at = next)
        {
            // The chain must go forward, which bounds its length; no known server has another.
            if (at <= last || at > body.Length - CapHead) throw Broken(client, head.Index, $"a capability at {at} of {body.Length} bytes");
            ReadOnlySpan<byte> cap = body[(int)at..];
            next = LittleEndian.U32(cap, 4);
            last = at + CapHead - 1;
            switch ((ushort)LittleEndian.U32(cap, 0))
            {
                case CapSparse:
                    areas = ParseAreas(client, head, cap);
                    break;
                case CapType when cap.Length >= 16:
                    (type, subtype) = (LittleEndian.U32(cap, 8), LittleEndian.U32(cap, 12));
                    break;
                case CapType:
                    throw Broken(client, head.Index, "the type capability is cut off");
                case CapMsixMappable:
                    msixMappable = true;
                    break;
                default:
                    break;
            }
        }
        bool mappable = hasFd && (head.Flags & VfioUserRegionInfo.FlagMmap) != 0;
        ulong whole = head.Size & ~(ulong)(VfioUserLimits.PageBytes - 1);
        if (!mappable) areas = [];
        else if (areas is null) areas = whole > 0 ? [new VfioRegionArea(0, whole)] : [];
        var flags = (VfioRegionFlags)(head.Flags & (VfioUserRegionInfo.FlagRead | VfioUserRegionInfo.FlagWrite));
        return new VfioRegionInfo
        {
            Index = head.Index, Flags = areas!.Count > 0 ? flags | VfioRegionFlags.Mmap : flags, SizeBytes = head.Size, Areas = areas,
            Type = type, Subtype = subtype, IsMsixMappable = msixMappable,
        };
    }

    private static List<VfioRegionArea> ParseAreas(VfioUserClient client, VfioUserRegionInfo head, ReadOnlySpan<byte> cap)
    {
        uint count = cap.Length >= 16 ? LittleEndian.U32(cap, 8) : 0;
        if (cap.Length < 16 || count > VfioUserLimits.SparseAreas || cap.Length < 16 + (16 * (int)count))
            throw Broken(client, head.Index, $"{count} areas in {cap.Length} bytes, at most {VfioUserLimits.SparseAreas} are taken");
        var areas = new List<VfioRegionArea>((int)count);
        for (int i = 0; i < (int)count; i++)
        {
            ulong offset = LittleEndian.U64(cap, 16 + (16 * i)), size = LittleEndian.U64(cap, 24 + (16 * i));
            if (size == 0) continue;
            if ((offset | size) % VfioUserLimits.PageBytes != 0 || offset > head.Size || size > head.Size - offset)
                throw Broken(client, head.Index, $"area {i}, 0x{offset:x}+0x{size:x}, is not page aligned inside 0x{head.Size:x} bytes");
            areas.Add(new VfioRegionArea(offset, size));
        }
        return areas;
    }

    private static VfioUserProtocolException Broken(VfioUserClient client, uint index, string what) => new($"vfio-user '{client.Name}': region {index} info: {what}");
}
