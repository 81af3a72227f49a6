using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Device;

/// <summary>Log messages of this assembly; ids 2000 to 2999. The device has 2000 to 2099.</summary>
internal static partial class VfioLog
{
    [LoggerMessage(2000, LogLevel.Warning, "device '{device}': reading {size} bytes of region {region} at 0x{offset:x} failed: {errno}; the guest gets all ones ({dropped} like this not shown)",
        EventName = "vfio_region_read")]
    internal static partial void RegionReadFailed(ILogger logger, string device, uint region, ulong offset, int size, Errno errno, long dropped);

    [LoggerMessage(2001, LogLevel.Warning, "device '{device}': writing {size} bytes of region {region} at 0x{offset:x} failed: {errno} ({dropped} like this not shown)",
        EventName = "vfio_region_write")]
    internal static partial void RegionWriteFailed(ILogger logger, string device, uint region, ulong offset, int size, Errno errno, long dropped);

    [LoggerMessage(2002, LogLevel.Warning, "device '{device}': interrupt request {request} failed: {errno} ({dropped} like this not shown)")]
    internal static partial void SetIrqsFailed(ILogger logger, string device, string request, Errno errno, long dropped);

    [LoggerMessage(2003, LogLevel.Error, "device '{device}' is gone: {reason}; the guest reads all ones from here on")]
    internal static partial void DeviceLost(ILogger logger, string device, string reason);

    [LoggerMessage(2015, LogLevel.Information, "device '{device}' is back: the VM's reset has attached it to a new server")]
    internal static partial void DeviceBack(ILogger logger, string device);

    [LoggerMessage(2016, LogLevel.Warning, "device '{device}' stays lost at this reset: {reason}")]
    internal static partial void DeviceStaysLost(ILogger logger, string device, string reason);

    [LoggerMessage(2004, LogLevel.Error, "device '{device}' reports an error that it cannot recover from; the VM stops", EventName = "vfio_err_notifier_handler")]
    internal static partial void ErrorInterrupt(ILogger logger, string device);

    [LoggerMessage(2005, LogLevel.Warning, "the host asks to give device '{device}' back; remove it from the VM", EventName = "vfio_req_notifier_handler")]
    internal static partial void RequestInterrupt(ILogger logger, string device);

    [LoggerMessage(2006, LogLevel.Warning, "device '{device}': reset failed: {errno}", EventName = "vfio_pci_reset")]
    internal static partial void ResetFailed(ILogger logger, string device, Errno errno);

    [LoggerMessage(2007, LogLevel.Warning, "device '{device}': the capability chain is broken; capabilities behind the break are not shown to the guest")]
    internal static partial void BrokenCapabilityChain(ILogger logger, string device);

    [LoggerMessage(2008, LogLevel.Warning, "device '{device}': BAR {bar} at 0x{offset:x} cannot be mapped; accesses go by call")]
    internal static partial void AreaNotMapped(ILogger logger, string device, int bar, ulong offset);

    [LoggerMessage(2009, LogLevel.Warning, "device '{device}': the ROM cannot be sized and is not shown to the guest")]
    internal static partial void RomNotSized(ILogger logger, string device);

    [LoggerMessage(2010, LogLevel.Warning, "device '{device}': stuck in power state D{state}")]
    internal static partial void StuckInPowerState(ILogger logger, string device, int state);

    [LoggerMessage(2011, LogLevel.Warning, "device '{device}': interrupts cannot be set up: {reason}")]
    internal static partial void InterruptsNotSetUp(ILogger logger, string device, string reason);

    [LoggerMessage(2012, LogLevel.Error, "device '{device}': could not stop the VM: {reason}")]
    internal static partial void StopFailed(ILogger logger, string device, string reason);

    [LoggerMessage(2014, LogLevel.Information, "device '{device}': the guest's acknowledgement of its pin does not reach it ({reason}); while the pin is in use, every access to a BAR takes the way through this process",
        EventName = "vfio_intx_enable_kvm")]
    internal static partial void IntxWithoutIrqFd(ILogger logger, string device, string reason);

    [LoggerMessage(2013, LogLevel.Warning, "device '{device}': bus mastering could not be set to {enabled}: {reason}")]
    internal static partial void BusMasterFailed(ILogger logger, string device, bool enabled, string reason);
}
