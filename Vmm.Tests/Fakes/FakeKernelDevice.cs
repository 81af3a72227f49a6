using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Fakes;

/// <summary>One device of <see cref="FakeVfioKernel"/>: the answers to its ioctls, and a record of their arguments.</summary>
internal sealed class FakeKernelDevice(string name)
{
    internal const int RegionShift = 40;

    internal string Name => name;

    internal bool IsMediated { get; init; }

    internal string Group { get; set; } = string.Empty;

    internal string? Cdev { get; set; }

    /// <summary>Regions by index: flags, size and capability chain. The chain lies behind the 32 bytes of the structure, so its first offset is 32.</summary>
    internal Dictionary<uint, (uint Flags, ulong Size, byte[] Caps)> Regions { get; } = new() { [7] = (3, 256, []) };

    internal Dictionary<uint, (uint Flags, uint Count)> Irqs { get; } = new() { [0] = (7, 1), [2] = (9, 4) };

    /// <summary>The migration state; null when the device cannot migrate.</summary>
    internal uint? MigState { get; set; }

    /// <summary>The bytes that a GET of each other feature returns.</summary>
    internal Dictionary<ushort, byte[]> Features { get; } = [];

    /// <summary>SET_IRQS payloads, headers included.</summary>
    internal List<byte[]> IrqSets { get; } = [];

    /// <summary>DEVICE_FEATURE requests: flags, data, and the buffer that a pointer in the data refers to.</summary>
    internal List<(uint Flags, byte[] Data, byte[] Pointee)> FeatureCalls { get; } = [];

    /// <summary>The result of SET_IRQS.</summary>
    internal int IrqResult { get; set; }

    /// <summary>Whether the next SET of a state hands out a data descriptor.</summary>
    internal bool GivesDataFd { get; set; }

    internal bool ResetWorks { get; set; } = true;

    internal Errno GetInfo(uint request, Span<byte> argument)
    {
        switch (request)
        {
            case VfioUapi.VFIO_DEVICE_GET_INFO:
                var info = new VfioUapi.DeviceInfo { Argsz = 24, Flags = 3, NumRegions = 10, NumIrqs = 5 };
                Ioctl.AsBytes(ref info).CopyTo(argument);
                return Errno.None;
            case VfioUapi.VFIO_DEVICE_GET_REGION_INFO:
                uint index = BinaryPrimitives.ReadUInt32LittleEndian(argument[8..]);
                if (!Regions.TryGetValue(index, out (uint Flags, ulong Size, byte[] Caps) r)) return Errno.EINVAL;
                bool fits = argument.Length >= 32 + r.Caps.Length;
                var region = new VfioUapi.RegionInfo
                {
                    Argsz = (uint)(32 + r.Caps.Length), Flags = r.Flags | (r.Caps.Length > 0 ? VfioUapi.VFIO_REGION_INFO_FLAG_CAPS : 0), Index = index, Size = r.Size,
                    Offset = (ulong)index << RegionShift, CapOffset = r.Caps.Length > 0 && fits ? 32u : 0,
                };
                Ioctl.AsBytes(ref region).CopyTo(argument);
                if (fits) r.Caps.CopyTo(argument[32..]);
                return Errno.None;
            default:
                uint irq = BinaryPrimitives.ReadUInt32LittleEndian(argument[8..]);
                if (!Irqs.TryGetValue(irq, out (uint Flags, uint Count) i)) return Errno.EINVAL;
                BinaryPrimitives.WriteUInt32LittleEndian(argument[4..], i.Flags);
                BinaryPrimitives.WriteUInt32LittleEndian(argument[12..], i.Count);
                return Errno.None;
        }
    }

    internal Errno Feature(Span<byte> argument, Span<byte> pointee, Func<int> newDataFd)
    {
        uint flags = BinaryPrimitives.ReadUInt32LittleEndian(argument[4..]);
        Span<byte> data = argument[8..];
        FeatureCalls.Add((flags, data.ToArray(), pointee.ToArray()));
        if (BinaryPrimitives.ReadUInt32LittleEndian(argument) != argument.Length) return Errno.EINVAL;
        var feature = (VfioDeviceFeature)(flags & VfioUapi.VFIO_DEVICE_FEATURE_MASK);
        if (feature == VfioDeviceFeature.MigDeviceState)
        {
            if (MigState is null) return Errno.ENOTTY;
            BinaryPrimitives.WriteInt32LittleEndian(data[4..], -1);
            if ((flags & (uint)VfioFeatureOp.Get) != 0)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(data, MigState.Value);
                return Errno.None;
            }
            MigState = BinaryPrimitives.ReadUInt32LittleEndian(data);
            if (GivesDataFd) BinaryPrimitives.WriteInt32LittleEndian(data[4..], newDataFd());
            return Errno.None;
        }
        if (!Features.TryGetValue((ushort)feature, out byte[]? value)) return Errno.ENOTTY;
        // The answer to DMA_LOGGING_REPORT goes to the buffer that its data points to; other answers go into the data.
        if (pointee.Length > 0 && (flags & (uint)VfioFeatureOp.Get) != 0)
            for (int i = 0; i < value.Length; i++) pointee[i] |= value[i];
        else if (value.Length > 0 && value.Length <= data.Length) value.CopyTo(data);
        return Errno.None;
    }
}
