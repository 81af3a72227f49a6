using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The v1 migration region: <c>u32 device_state@0, u32 reserved@4, u64 pending_bytes@8, u64 data_offset@16, u64 data_size@24</c>, then the data
/// section wherever data_offset says (vfio-migration 5.1). The header is always accessed by call, at native width; the data section by
/// <see cref="VfioMigrationRegionData"/>. What the device says about places and sizes is checked before it is used.
/// </summary>
/// <param name="io">The device; not owned.</param>
/// <param name="info">The region.</param>
internal sealed class VfioMigrationRegion(IVfioDeviceIo io, VfioRegionInfo info)
{
    /// <summary>RUNNING, SAVING and RESUMING.</summary>
    internal const uint StateMask = 7, Running = 1, Saving = 2, Resuming = 4;

    private const ulong DeviceState = 0, PendingBytes = 8, DataOffset = 16, DataSize = 24;

    /// <summary>Size of the region.</summary>
    internal ulong SizeBytes => info.SizeBytes;

    /// <summary>Whether a state may be written: RESUMING must not be combined with another bit (vfio-migration 5.2; QEMU: <c>VFIO_DEVICE_STATE_VALID</c>).</summary>
    /// <returns>True when it may be written.</returns>
    internal static bool IsValid(uint state) => (state & Resuming) == 0 || (state & StateMask) == Resuming;

    /// <summary>Whether the device says that it is broken (QEMU: <c>VFIO_DEVICE_STATE_IS_ERROR</c>).</summary>
    /// <returns>SAVING and RESUMING without RUNNING.</returns>
    internal static bool IsError(uint state) => (state & StateMask) == (Saving | Resuming);

    /// <summary>The way to the data section, for one session; nothing is mapped yet.</summary>
    internal VfioMigrationRegionData OpenData() => new(this, io, info);

    internal Errno ReadState(out uint state)
    {
        Span<byte> bytes = stackalloc byte[4];
        Errno errno = io.RegionRead(info.Index, DeviceState, bytes);
        state = errno == Errno.None ? BinaryPrimitives.ReadUInt32LittleEndian(bytes) : 0;
        return errno;
    }

    internal Errno WriteState(uint state)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, state);
        return io.RegionWrite(info.Index, DeviceState, bytes);
    }

    internal Errno ReadPendingBytes(out ulong bytes) => ReadHeader(PendingBytes, out bytes);

    /// <summary>Offset of the next data. Reading it makes a saving device put its data there.</summary>
    internal ulong ReadDataOffset()
    {
        Errno errno = ReadHeader(DataOffset, out ulong offset);
        if (errno != Errno.None) throw Failed("read data_offset", errno);
        if (offset < 32 || offset > info.SizeBytes)
            throw new VfioException($"device '{io.Name}': data_offset 0x{offset:x} is not inside the data section, 0x20 to 0x{info.SizeBytes:x}", Errno.EINVAL);
        return offset;
    }

    /// <summary>Number of bytes at the data offset.</summary>
    internal ulong ReadDataSize(ulong offset)
    {
        Errno errno = ReadHeader(DataSize, out ulong size);
        if (errno != Errno.None) throw Failed("read data_size", errno);
        if (size > info.SizeBytes - offset)
            throw new VfioException($"device '{io.Name}': data_size 0x{size:x} at 0x{offset:x} goes beyond the region of 0x{info.SizeBytes:x} bytes", Errno.EINVAL);
        return size;
    }

    /// <summary>Tells a resuming device that its data are in place.</summary>
    internal void CommitDataSize(ulong size)
    {
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, size);
        Errno errno = io.RegionWrite(info.Index, DataSize, bytes);
        if (errno != Errno.None) throw Failed("write data_size", errno);
    }

    /// <summary>The error of a data offset at the very end of the region.</summary>
    internal VfioException NoRoom(ulong offset) =>
        new($"device '{io.Name}': data_offset 0x{offset:x} leaves no room in the region of 0x{info.SizeBytes:x} bytes", Errno.ENOSPC);

    /// <summary>The error of an access to the region.</summary>
    internal VfioException Failed(string what, Errno errno) => new($"device '{io.Name}': migration region: {what} failed ({errno})", errno);

    private Errno ReadHeader(ulong field, out ulong value)
    {
        Span<byte> bytes = stackalloc byte[8];
        Errno errno = io.RegionRead(info.Index, field, bytes);
        value = errno == Errno.None ? BinaryPrimitives.ReadUInt64LittleEndian(bytes) : 0;
        return errno;
    }
}
