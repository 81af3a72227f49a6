using Microsoft.Extensions.Logging;

namespace Vmm.Core.Diagnostics;

/// <summary>Log messages of this assembly; ids 1000 to 1999.</summary>
internal static partial class CoreLog
{
    [LoggerMessage(1001, LogLevel.Warning, "serial port '{device}': cannot write '{path}': {error}; all further output is dropped")]
    internal static partial void SerialOutputLost(ILogger logger, string device, string path, string error);

    [LoggerMessage(1002, LogLevel.Error, "an eventfd handler failed; all its further interrupts are lost")]
    internal static partial void EventFdHandlerFailed(ILogger logger, Exception error);

    [LoggerMessage(1003, LogLevel.Error, "the guest stopped: {error}")]
    internal static partial void VcpuStopped(ILogger logger, string error);

    [LoggerMessage(1004, LogLevel.Warning, "the kernel overran a vCPU's dirty ring of {entries} entries; all pages count as dirty")]
    internal static partial void DirtyRingOverrun(ILogger logger, int entries);

    [LoggerMessage(1005, LogLevel.Error, "the guest asked for {request}, which failed: {error}; the VM is {state}")]
    internal static partial void GuestRequestFailed(ILogger logger, string request, string error, string state);
}
