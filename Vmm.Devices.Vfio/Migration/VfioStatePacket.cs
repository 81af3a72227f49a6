using System.Buffers.Binary;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One buffer of a device's state on a data channel: be32 <c>version 0, idx, flags (bit 0: config)</c>, then data (vfio-migration 3.7; QEMU:
/// <c>VFIODeviceStatePacket</c>).
/// </summary>
internal static class VfioStatePacket
{
    /// <summary>Bytes before the data.</summary>
    internal const int HeaderBytes = 12;

    /// <summary>The data are the CONFIG record, and there is no later packet.</summary>
    internal const uint ConfigState = 1;

    /// <summary>Writes the header.</summary>
    internal static void WriteHeader(Span<byte> packet, uint index, uint flags)
    {
        BinaryPrimitives.WriteUInt32BigEndian(packet, 0);
        BinaryPrimitives.WriteUInt32BigEndian(packet[4..], index);
        BinaryPrimitives.WriteUInt32BigEndian(packet[8..], flags);
    }

    /// <summary>Reads and checks the header.</summary>
    /// <returns>Index, whether it is the config, and the data.</returns>
    internal static (uint Index, bool IsConfig) ReadHeader(string device, ReadOnlySpan<byte> packet)
    {
        if (packet.Length <= HeaderBytes)
            throw new StreamFormatException($"device '{device}': state packet of {packet.Length} bytes, expected more than {HeaderBytes}") { Expected = $"over {HeaderBytes}", Found = $"{packet.Length}" };
        uint version = BinaryPrimitives.ReadUInt32BigEndian(packet), index = BinaryPrimitives.ReadUInt32BigEndian(packet[4..]), flags = BinaryPrimitives.ReadUInt32BigEndian(packet[8..]);
        if (version != 0) throw new StreamFormatException($"device '{device}': state packet of version {version}, expected 0") { Expected = "0", Found = $"{version}" };
        if (index == uint.MaxValue) throw new StreamFormatException($"device '{device}': state packet with index {index}, which none may have");
        if ((flags & ~ConfigState) != 0) throw new StreamFormatException($"device '{device}': state packet {index} with unknown flags 0x{flags:x}");
        return (index, (flags & ConfigState) != 0);
    }
}
