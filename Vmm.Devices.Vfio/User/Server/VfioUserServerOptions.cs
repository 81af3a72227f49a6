using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>Limits and behaviour of a <see cref="VfioUserServer"/>.</summary>
public sealed record VfioUserServerOptions
{
    /// <summary>Most descriptors that one message to the server may carry; 8 to 16 (vfio-user S-8).</summary>
    public int MaxMsgFds { get; init; } = 8;

    /// <summary>Most bytes of data in one message to the server; up to 64 MiB, QEMU's own limit.</summary>
    public int MaxDataXferBytes { get; init; } = VfioUserLimits.DataXferBytes;

    /// <summary>Most DMA maps that one client may have.</summary>
    public int MaxDmaMaps { get; init; } = VfioUserLimits.DmaMaps;

    /// <summary>Offer REGION_WRITE_MULTI to clients.</summary>
    public bool WriteMultiple { get; init; } = true;

    /// <summary>Give a client that asks for it a second socket for DMA messages.</summary>
    public bool TwinSocket { get; init; } = true;

    /// <summary>
    /// Map the client's descriptors. A client that truncates its memory file afterwards ends this process by SIGBUS. Set it to false for clients
    /// that are not trusted; every access is then a pread or pwrite (vfio-user S-18).
    /// </summary>
    public bool MapClientMemory { get; init; } = true;

    /// <summary>
    /// Map only descriptors that are sealed against shrinking, as those of QEMU's memory-backend-memfd are; others are accessed as without
    /// <see cref="MapClientMemory"/>. No client can then end this process.
    /// </summary>
    public bool MapOnlySealed { get; init; }

    /// <summary>Show region 9, the migration protocol from before September 2023 (vfio-user 9).</summary>
    public bool LegacyMigrationRegion { get; init; }

    /// <summary>How long a device may take to stop its DMA before the request that needs it is refused (vfio-user S-31, S-34).</summary>
    public TimeSpan QuiesceTimeout { get; init; } = VfioUserDeadlines.Quiesce;

    /// <summary>How long a connection may take until its VERSION is there.</summary>
    internal TimeSpan GreetingTimeout { get; init; } = VfioUserDeadlines.Greeting;

    /// <summary>How long a message may be under way without moving a byte.</summary>
    internal TimeSpan StallTimeout { get; init; } = VfioUserDeadlines.Stall;

    /// <summary>End the server after its first client.</summary>
    public bool Once { get; init; }

    /// <summary>Makes the loggers of the server and of its device.</summary>
    public ILogger Logger { get; init; } = NullLogger.Instance;
}
