using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>How a <see cref="VfioUserServer"/> serves.</summary>
public sealed record VfioUserServerOptions
{
    /// <summary>Descriptors we take with one message; 8 to 16 (vfio-user S-8).</summary>
    public int MaxMsgFds { get; init; } = 8;

    /// <summary>Largest count in a data message towards us; up to 64 MiB, which is what QEMU accepts.</summary>
    public int MaxDataXferBytes { get; init; } = VfioUserLimits.DataXferBytes;

    /// <summary>Most maps of one client.</summary>
    public int MaxDmaMaps { get; init; } = 65535;

    /// <summary>Understand REGION_WRITE_MULTI and say so.</summary>
    public bool WriteMultiple { get; init; } = true;

    /// <summary>Give a client that asks a socket of its own for DMA messages.</summary>
    public bool TwinSocket { get; init; } = true;

    /// <summary>
    /// Map the client's descriptors. A client that truncates its memory file afterwards ends this process by SIGBUS: with false, for clients
    /// that are not trusted, every access is a pread or pwrite (vfio-user S-18).
    /// </summary>
    public bool MapClientMemory { get; init; } = true;

    /// <summary>
    /// Map only descriptors that are sealed against shrinking, which QEMU's memory-backend-memfd makes by itself; the others are read and
    /// written as without <see cref="MapClientMemory"/>. No client can end this process then.
    /// </summary>
    public bool MapOnlySealed { get; init; }

    /// <summary>Show region 9, the migration protocol of before 2023 (vfio-user 9).</summary>
    public bool LegacyMigrationRegion { get; init; }

    /// <summary>How long a device may take to become quiet before the request is refused (vfio-user S-31, S-34).</summary>
    public TimeSpan QuiesceTimeout { get; init; } = TimeSpan.FromSeconds(3);

    /// <summary>End after the first client.</summary>
    public bool Once { get; init; }

    /// <summary>Where messages go.</summary>
    public ILogger Logger { get; init; } = NullLogger.Instance;
}
