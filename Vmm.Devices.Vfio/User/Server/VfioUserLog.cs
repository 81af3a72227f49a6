using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>Log messages of the vfio-user server; ids 2500 to 2599.</summary>
internal static partial class VfioUserLog
{
    [LoggerMessage(2500, LogLevel.Information, "vfio-user '{path}': serving {type}")]
    internal static partial void Listening(ILogger logger, string path, string type);

    [LoggerMessage(2501, LogLevel.Information, "vfio-user '{path}': client connected, protocol 0.{minor}")]
    internal static partial void Connected(ILogger logger, string path, int minor);

    [LoggerMessage(2502, LogLevel.Information, "vfio-user '{path}': client gone{reason}; {stats}")]
    internal static partial void Disconnected(ILogger logger, string path, string reason, VfioUserServerStats stats);

    [LoggerMessage(2510, LogLevel.Information, "vfio-user '{path}': a connection ended without being served{reason}")]
    internal static partial void NotServed(ILogger logger, string path, string reason);

    [LoggerMessage(2511, LogLevel.Warning, "vfio-user '{path}': cannot accept a client: {reason}; trying again")]
    internal static partial void AcceptFailed(ILogger logger, string path, string reason);

    [LoggerMessage(2503, LogLevel.Debug, "vfio-user '{path}': {command} refused, {errno}{posted}")]
    internal static partial void Refused(ILogger logger, string path, VfioUserCommand command, Errno errno, string posted);

    [LoggerMessage(2504, LogLevel.Warning, "vfio-user '{path}': {command}: {error}")]
    internal static partial void DeviceFailed(ILogger logger, string path, VfioUserCommand command, string error);

    [LoggerMessage(2505, LogLevel.Information, "vfio-user '{path}': migration state {from} -> {to}, {errno}", EventName = "vfio_migration_set_device_state")]
    internal static partial void StateChanged(ILogger logger, string path, VfioDeviceState from, VfioDeviceState to, Errno errno);

    [LoggerMessage(2506, LogLevel.Warning, "vfio-user '{path}': {command} took {milliseconds} ms; QEMU gives up after 5000")]
    internal static partial void Slow(ILogger logger, string path, VfioUserCommand command, long milliseconds);

    [LoggerMessage(2507, LogLevel.Warning, "vfio-user '{path}': the device did not become quiet within {milliseconds} ms")]
    internal static partial void QuiesceTimeout(ILogger logger, string path, long milliseconds);

    [LoggerMessage(2509, LogLevel.Warning, "vfio-user '{path}': the device did not change its migration state within {milliseconds} ms; it goes on")]
    internal static partial void StepTimeout(ILogger logger, string path, long milliseconds);

    [LoggerMessage(2508, LogLevel.Warning, "vfio-user '{path}': a register write in STOP_COPY was dropped, region {region} offset {offset}")]
    internal static partial void WriteDropped(ILogger logger, string path, uint region, ulong offset);
}
