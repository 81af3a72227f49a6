using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

internal sealed partial class VfioUserSession
{
    /// <summary>REGION_READ (vfio-user 3.6): the reply is the request's 16 bytes and the data. An access inside a region never fails (vfio-user S-15).</summary>
    private Errno RegionRead(ReadOnlySpan<byte> body)
    {
        if (!VfioUserRegionAccess.TryRead(body, out VfioUserRegionAccess request) || !IsInside(request, out VfioUserRegion? region)) return Errno.EINVAL;
        // libvfio-user answers with a bare header.
        if (request.Count == 0) return Errno.None;
        Span<byte> payload = Payload(VfioUserRegionAccess.Length + (int)request.Count);
        Span<byte> data = payload[VfioUserRegionAccess.Length..];
        data.Clear();
        if (region is null)
        {
            Errno errno = IsFsmFree() ? Legacy.Read(request.Offset, data) : Errno.EIO;
            if (errno != Errno.None) return errno;
        }
        else
        {
            _backend.RegionRead(request.Region, request.Offset, data);
        }
        request.Write(payload);
        return Errno.None;
    }

    /// <summary>REGION_WRITE (vfio-user 3.6): the reply is the request's 16 bytes.</summary>
    private Errno RegionWrite(ReadOnlySpan<byte> body)
    {
        if (!VfioUserRegionAccess.TryRead(body, out VfioUserRegionAccess request)) return Errno.EINVAL;
        ReadOnlySpan<byte> data = body[VfioUserRegionAccess.Length..];
        if ((uint)data.Length != request.Count || !IsInside(request, out VfioUserRegion? region)) return Errno.EINVAL;
        if (request.Count == 0) return Errno.None;
        Errno errno = region is null ? (IsFsmFree() ? Legacy.Write(request.Offset, data) : Errno.EIO) : Write(region, request.Offset, data);
        if (errno != Errno.None) return errno;
        request.Write(Payload(VfioUserRegionAccess.Length));
        return Errno.None;
    }

    /// <summary>REGION_WRITE_MULTI (vfio-user 3.7): <c>u64 n</c> and n entries, applied in order; the reply counts those done (vfio-user S-17).</summary>
    private Errno RegionWriteMulti(ReadOnlySpan<byte> body)
    {
        if (body.Length < VfioUserWriteMulti.HeadBytes) return Errno.EINVAL;
        ulong count = VfioUserWriteMulti.ReadCount(body);
        ReadOnlySpan<byte> entries = body[VfioUserWriteMulti.HeadBytes..];
        if (count > VfioUserLimits.WriteMultiEntries || count * VfioUserWriteMulti.EntryBytes != (ulong)entries.Length) return Errno.EINVAL;
        // All entries are checked before the first is applied, so that an error leaves none applied.
        for (ReadOnlySpan<byte> rest = entries; rest.Length > 0; rest = rest[VfioUserWriteMulti.EntryBytes..])
        {
            VfioUserRegionAccess access = VfioUserWriteMulti.ReadEntry(rest, out _);
            if (access.Count is 0 or > VfioUserWriteMulti.MaxData || !IsInside(access, out VfioUserRegion? region) || region is null) return Errno.EINVAL;
        }
        for (; entries.Length > 0; entries = entries[VfioUserWriteMulti.EntryBytes..])
        {
            VfioUserRegionAccess access = VfioUserWriteMulti.ReadEntry(entries, out ReadOnlySpan<byte> data);
            Errno errno = Write(_device.Region(access.Region)!, access.Offset, data);
            if (errno != Errno.None) return errno;
        }
        VfioUserWriteMulti.WriteCount(Payload(VfioUserWriteMulti.HeadBytes), count);
        return Errno.None;
    }

    /// <summary>Whether an access lies in an existing region. The region is null for the legacy migration region, which is not the device's.</summary>
    private bool IsInside(in VfioUserRegionAccess access, out VfioUserRegion? region)
    {
        region = _device.Region(access.Region);
        if (access.Count > (uint)_device.Options.MaxDataXferBytes) return false;
        ulong size = region?.SizeBytes ?? (access.Region == VfioPciRegion.FirstDeviceSpecific && access.Region < _device.RegionCount ? VfioUserLegacyMigration.SizeBytes : 0);
        return access.Offset < size && access.Count <= size - access.Offset;
    }

    private Errno Write(VfioUserRegion region, ulong offset, ReadOnlySpan<byte> data)
    {
        // Dropped: the state is being read and must not change (vfio-user S-35), and an error would stop some clients (vfio-user S-15).
        if (_device.Fsm.State == VfioDeviceState.StopCopy) VfioUserLog.WriteDropped(_logger, _socket.Name, region.Index, offset);
        else if (region.IsWritable) _backend.RegionWrite(region.Index, offset, data);
        return region.Index == VfioPciRegion.Config && IsFunctionReset(offset, data) ? Reset() : Errno.None;
    }

    /// <summary>Whether a write to config space asks for a function-level reset (vfio-user 7): bit 15 of device control of a function that has one.</summary>
    private bool IsFunctionReset(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset < PciRegisters.HeaderBytes) return false;
        Span<byte> config = stackalloc byte[PciConfigSpace.LegacyBytes];
        config.Clear();
        _backend.RegionRead(VfioPciRegion.Config, 0, config);
        if ((config[PciRegisters.Status] & PciRegisters.StatusCapabilityList) == 0) return false;
        int at = config[PciRegisters.CapabilityList] & ~3;
        for (int left = PciConfigSpace.LegacyBytes / 4; at >= PciRegisters.HeaderBytes && at <= PciConfigSpace.LegacyBytes - 12 && left > 0; left--)
        {
            if (config[at] != PciCapabilityId.Express)
            {
                at = config[at + 1] & ~3;
                continue;
            }
            const uint canReset = 1 << 28;
            // A write of any width may contain the byte with the bit.
            ulong bitAt = (ulong)at + 9;
            return (LittleEndian.U32(config, at + 4) & canReset) != 0 && bitAt >= offset && bitAt - offset < (uint)data.Length && (data[(int)(bitAt - offset)] & 0x80) != 0;
        }
        return false;
    }
}
