using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

internal sealed partial class VfioUserSession
{
    private const uint CapSparseMmap = 1, CapType = 2, SparseHeadBytes = 16, AreaBytes = 16, TypeCapBytes = 16;

    /// <summary>
    /// DEVICE_GET_INFO (vfio-user 3.1); sets the reset flag. DEVICE_RESET works also for clients that read the flag the other way round (vfio-user
    /// S-10).
    /// </summary>
    private Errno GetInfo(ReadOnlySpan<byte> body)
    {
        if (!VfioUserDeviceInfo.TryRead(body, out VfioUserDeviceInfo request) || request.ArgSz < VfioUserDeviceInfo.Length) return Errno.EINVAL;
        new VfioUserDeviceInfo(VfioUserDeviceInfo.Length, VfioUserDeviceInfo.FlagReset | VfioUserDeviceInfo.FlagPci, _device.RegionCount, VfioUserIrqs.IndexCount)
            .Write(Payload(VfioUserDeviceInfo.Length));
        return Errno.None;
    }

    /// <summary>
    /// DEVICE_GET_REGION_INFO (vfio-user 3.2). A reply is never longer than asked for (vfio-user S-12): for a region with areas the first, short reply says
    /// how long the full one is, and carries no descriptor. A wholly mappable region needs no capability, so its first reply has the descriptor.
    /// </summary>
    private Errno GetRegionInfo(ReadOnlySpan<byte> body)
    {
        if (!VfioUserRegionInfo.TryRead(body, out VfioUserRegionInfo request) || request.ArgSz < VfioUserRegionInfo.Length || request.Index >= _device.RegionCount)
            return Errno.EINVAL;
        if (request.Index == VfioPciRegion.FirstDeviceSpecific) return LegacyRegionInfo(request);
        VfioUserRegion? region = _device.Region(request.Index);
        if (region is null)
        {
            // An absent region is no error (vfio-user S-11).
            new VfioUserRegionInfo(VfioUserRegionInfo.Length, 0, request.Index, 0, 0, 0).Write(Payload(VfioUserRegionInfo.Length));
            return Errno.None;
        }
        bool canSend = region.Memory is not null && _client.MaxMsgFds > 0;
        uint flags = VfioUserRegionInfo.FlagRead | (region.IsWritable ? VfioUserRegionInfo.FlagWrite : 0) | (canSend ? VfioUserRegionInfo.FlagMmap : 0);
        uint capBytes = canSend && region.Areas.Count > 0 ? SparseHeadBytes + (AreaBytes * (uint)region.Areas.Count) : 0;
        uint full = VfioUserRegionInfo.Length + capBytes;
        bool isFull = request.ArgSz >= full;
        Span<byte> payload = Payload((int)(isFull ? full : VfioUserRegionInfo.Length));
        bool hasCaps = isFull && capBytes > 0;
        new VfioUserRegionInfo(full, flags | (hasCaps ? VfioUserRegionInfo.FlagCaps : 0), request.Index, hasCaps ? VfioUserRegionInfo.Length : 0u, region.SizeBytes, 0).Write(payload);
        if (canSend && isFull) _replyFd = region.Memory!.Fd;
        if (hasCaps) WriteSparse(payload[VfioUserRegionInfo.Length..], region.Areas);
        return Errno.None;
    }

    /// <summary>Capability 1: <c>u16 id, u16 version, u32 next, u32 nr_areas, u32 reserved, { u64 offset, u64 size }...</c></summary>
    private static void WriteSparse(Span<byte> cap, IReadOnlyList<VfioRegionArea> areas)
    {
        WriteCapHead(cap, CapSparseMmap);
        LittleEndian.U32(cap, 8, (uint)areas.Count);
        LittleEndian.U32(cap, 12, 0);
        for (int i = 0; i < areas.Count; i++)
        {
            LittleEndian.U64(cap, (int)SparseHeadBytes + (i * (int)AreaBytes), areas[i].OffsetBytes);
            LittleEndian.U64(cap, (int)SparseHeadBytes + (i * (int)AreaBytes) + 8, areas[i].SizeBytes);
        }
    }

    /// <summary>Identifies region 9 (vfio-user 9) by capability 2: <c>u32 type, u32 subtype</c>.</summary>
    private Errno LegacyRegionInfo(in VfioUserRegionInfo request)
    {
        const uint full = VfioUserRegionInfo.Length + TypeCapBytes;
        bool isFull = request.ArgSz >= full;
        Span<byte> payload = Payload((int)(isFull ? full : VfioUserRegionInfo.Length));
        uint flags = VfioUserRegionInfo.FlagRead | VfioUserRegionInfo.FlagWrite | (isFull ? VfioUserRegionInfo.FlagCaps : 0);
        new VfioUserRegionInfo(full, flags, request.Index, isFull ? VfioUserRegionInfo.Length : 0u, VfioUserLegacyMigration.SizeBytes, 0).Write(payload);
        if (!isFull) return Errno.None;
        Span<byte> cap = payload[VfioUserRegionInfo.Length..];
        WriteCapHead(cap, CapType);
        LittleEndian.U32(cap, 8, VfioPciRegion.MigrationType);
        LittleEndian.U32(cap, 12, VfioPciRegion.MigrationSubtype);
        return Errno.None;
    }

    private static void WriteCapHead(Span<byte> cap, uint id)
    {
        LittleEndian.U32(cap, 0, id | (1 << 16));
        LittleEndian.U32(cap, 4, 0);
    }

    /// <summary>DEVICE_GET_REGION_IO_FDS (vfio-user 3.3): no ioeventfds (vfio-user S-13).</summary>
    private Errno GetRegionIoFds(ReadOnlySpan<byte> body)
    {
        if (!VfioUserRegionIoFds.TryRead(body, out VfioUserRegionIoFds request) || request.ArgSz is < VfioUserRegionIoFds.Length or > VfioUserLimits.ArgSizeBytes || request.Flags != 0
            || request.Count != 0 || _device.Region(request.Index) is null) return Errno.EINVAL;
        new VfioUserRegionIoFds(VfioUserRegionIoFds.Length, 0, request.Index, 0).Write(Payload(VfioUserRegionIoFds.Length));
        return Errno.None;
    }

    /// <summary>DEVICE_GET_IRQ_INFO (vfio-user 3.4): INTx masks itself when it signals, as the kernel's does.</summary>
    private Errno GetIrqInfo(ReadOnlySpan<byte> body)
    {
        if (!VfioUserIrqInfo.TryRead(body, out VfioUserIrqInfo request) || request.ArgSz < VfioUserIrqInfo.Length || request.Index >= VfioUserIrqs.IndexCount) return Errno.EINVAL;
        VfioIrqInfoFlags flags = VfioIrqInfoFlags.EventFd | (request.Index == VfioPciIrq.Intx ? VfioIrqInfoFlags.Maskable | VfioIrqInfoFlags.AutoMasked : 0);
        new VfioUserIrqInfo(VfioUserIrqInfo.Length, (uint)flags, request.Index, _device.Irqs.Count(request.Index)).Write(Payload(VfioUserIrqInfo.Length));
        return Errno.None;
    }

    /// <summary>DEVICE_SET_IRQS (vfio-user 3.5), with all checks of vfio-user S-14. The reply is a bare header.</summary>
    private Errno SetIrqs(ReadOnlySpan<byte> body)
    {
        if (!VfioUserIrqSet.TryRead(body, out VfioUserIrqSet request) || request.ArgSz < VfioUserIrqSet.Length || request.Index >= VfioUserIrqs.IndexCount) return Errno.EINVAL;
        const VfioIrqSetFlags data = VfioIrqSetFlags.DataNone | VfioIrqSetFlags.DataBool | VfioIrqSetFlags.DataEventFd;
        const VfioIrqSetFlags action = VfioIrqSetFlags.ActionMask | VfioIrqSetFlags.ActionUnmask | VfioIrqSetFlags.ActionTrigger;
        if ((request.Flags & ~(data | action)) != 0 || !uint.IsPow2((uint)(request.Flags & data)) || !uint.IsPow2((uint)(request.Flags & action))) return Errno.EINVAL;
        ReadOnlySpan<byte> bools = body[VfioUserIrqSet.Length..];
        bool isBool = (request.Flags & VfioIrqSetFlags.DataBool) != 0, isEventFd = (request.Flags & VfioIrqSetFlags.DataEventFd) != 0;
        bool isTrigger = (request.Flags & VfioIrqSetFlags.ActionTrigger) != 0;
        uint available = _device.Irqs.Count(request.Index);
        if (request.Count == 0)
        {
            if (!isTrigger || isBool || isEventFd || request.Start != 0) return Errno.EINVAL;
        }
        else if (request.Start >= available || request.Count > available - request.Start)
        {
            return Errno.EINVAL;
        }
        if (request.Index >= VfioPciIrq.Err && (!isTrigger || request.Count > 1)) return Errno.EINVAL;
        if (isBool && bools.Length != request.Count) return Errno.EINVAL;
        // An eventfd has a meaning only with the action TRIGGER.
        if (isEventFd ? !isTrigger || (_fds.Count != 0 && _fds.Count != request.Count) : _fds.Count != 0) return Errno.EINVAL;
        _device.Irqs.Apply(new VfioIrqSet(request.Flags, request.Index, request.Start, request.Count), bools, _fds);
        return Errno.None;
    }
}
