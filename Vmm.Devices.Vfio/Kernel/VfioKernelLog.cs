using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>Log messages of the kernel backend; ids 2400 to 2449.</summary>
internal static partial class VfioKernelLog
{
    [LoggerMessage(2400, LogLevel.Warning, "{device}: found in migration state {state}; it is reset")]
    internal static partial void StaleState(ILogger logger, string device, VfioDeviceState state);

    [LoggerMessage(2401, LogLevel.Warning, "{device}: region {region}: cannot map 0x{offset:x}+0x{size:x} ({errno}); it is accessed by calls")]
    internal static partial void CannotMap(ILogger logger, string device, uint region, ulong offset, ulong size, Errno errno);

    [LoggerMessage(2402, LogLevel.Warning, "{device}: interrupt {index}: {wanted} vectors wanted, the host has {available}")]
    internal static partial void TooFewVectors(ILogger logger, string device, uint index, uint wanted, int available);

    [LoggerMessage(2403, LogLevel.Warning, "{container}: no device can reach 0x{start:x}+0x{size:x}, which the IOMMU keeps for itself; it stays unmapped")]
    internal static partial void ReservedRange(ILogger logger, string container, ulong start, ulong size);

    [LoggerMessage(2404, LogLevel.Debug, "{device}: opened through {way}, container {container}")]
    internal static partial void Opened(ILogger logger, string device, string way, string container);

    [LoggerMessage(2405, LogLevel.Warning, "{container}: {what}: {errno}")]
    internal static partial void CleanupFailed(ILogger logger, string container, string what, Errno errno);
}
