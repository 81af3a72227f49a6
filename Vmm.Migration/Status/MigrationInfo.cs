using Vmm.Migration.Channels;

namespace Vmm.Migration.Status;

/// <summary>RAM counters of a migration (QEMU: MigrationStats; qmp 8.7).</summary>
public sealed record RamStats
{
    /// <summary>Bytes sent, RAM and device stream together.</summary>
    public long TransferredBytes { get; init; }
    /// <summary>Bytes of RAM still to send.</summary>
    public long RemainingBytes { get; init; }
    /// <summary>Bytes of RAM in all.</summary>
    public long TotalBytes { get; init; }
    /// <summary>Zero pages sent.</summary>
    public long DuplicatePages { get; init; }
    /// <summary>Data pages sent.</summary>
    public long NormalPages { get; init; }
    /// <summary>Pages a second that the guest dirtied in the last period.</summary>
    public long DirtyPagesRate { get; init; }
    /// <summary>Throughput, 10^6 bit/s.</summary>
    public double Mbps { get; init; }
    /// <summary>Pages a second sent.</summary>
    public long PagesPerSecond { get; init; }
    /// <summary>Dirty bitmap synchronisations.</summary>
    public long DirtySyncCount { get; init; }
    /// <summary>Bytes sent before the VM stopped.</summary>
    public long PrecopyBytes { get; init; }
    /// <summary>Bytes sent while the VM was stopped.</summary>
    public long DowntimeBytes { get; init; }
    /// <summary>Bytes sent over channels of multifd, pages and device state with their headers.</summary>
    public long MultifdBytes { get; init; }
}

/// <summary>Counters of capability xbzrle (QEMU: XBZRLECacheStats; qmp 8.7).</summary>
internal sealed record XbzrleStats
{
    /// <summary>Size of the cache.</summary>
    public ulong CacheSizeBytes { get; init; }
    /// <summary>Bytes of deltas, and of pages that had no room in one.</summary>
    public long Bytes { get; init; }
    /// <summary>Pages that the cache had.</summary>
    public long Pages { get; init; }
    /// <summary>Pages that the cache did not have.</summary>
    public long CacheMisses { get; init; }
    /// <summary>Misses in the last period for each page sent.</summary>
    public double CacheMissRate { get; init; }
    /// <summary>How much smaller than their pages the deltas of the last period were.</summary>
    public double EncodingRate { get; init; }
    /// <summary>Pages that had no room in a delta.</summary>
    public long Overflows { get; init; }
}

/// <summary>
/// The parts of the downtime, in ms with fractions. The source measures from the stop of its VM to the destination's confirmation. The destination measures
/// from the first section that only a stopped source sends to the moment when its VM runs.
/// </summary>
public sealed record DowntimeReport
{
    /// <summary>Draining buffers before the stop, while the VM still ran. Not part of <see cref="TotalMs"/>.</summary>
    public double DrainMs { get; init; }
    /// <summary>Stopping devices and vCPUs.</summary>
    public double DeviceStopMs { get; init; }
    /// <summary>Final synchronisation of dirty pages, and END sections.</summary>
    public double FinalRamMs { get; init; }
    /// <summary>Writing device state sections.</summary>
    public double DeviceStateMs { get; init; }
    /// <summary>Flushing the last bytes of the stream.</summary>
    public double SendMs { get; init; }
    /// <summary>On the destination: loading. On the source: waiting for the confirmation.</summary>
    public double LoadMs { get; init; }
    /// <summary>Starting devices and vCPUs on the destination.</summary>
    public double StartMs { get; init; }
    /// <summary>The whole time that this side measures.</summary>
    public double TotalMs { get; init; }
    /// <summary>CLOCK_MONOTONIC, ns: when the source began to stop the VM, or when the destination ran it. All processes of a host share this clock.</summary>
    public long AtNs { get; init; }
    /// <summary>
    /// CLOCK_MONOTONIC, ns: when the last vCPU left the guest on the source, or the first one entered it on the destination; 0 without vCPUs or when the guest
    /// did not run. Between two processes of one host the difference is the gap that the guest itself can notice.
    /// </summary>
    public long GuestAtNs { get; init; }
}

/// <summary>
/// The error record of a failed migration. QMP, command and log show the same text, and the other side gets the record when the return path is open.
/// </summary>
public sealed record MigrationError
{
    /// <summary>Which side failed first: <c>source</c> or <c>destination</c>.</summary>
    public required string Side { get; init; }
    /// <summary>The phase that failed: connect, setup, iterate, stop, complete, device-state, load, start, ...</summary>
    public required string Phase { get; init; }
    /// <summary>The cause in one line.</summary>
    public required string Message { get; init; }
    /// <summary>Section or device, or null.</summary>
    public string? Section { get; init; }
    /// <summary>Stream offset, or null.</summary>
    public long? Offset { get; init; }
    /// <summary>What was expected, or null.</summary>
    public string? Expected { get; init; }
    /// <summary>What was found, or null.</summary>
    public string? Found { get; init; }
    /// <summary>What the user can do, or null.</summary>
    public string? Hint { get; init; }

    /// <summary>The record as one line, e.g. <c>destination, load: section 'ram/0': ...</c>.</summary>
    public override string ToString()
    {
        string hint = Hint is null ? string.Empty : $" (hint: {Hint})";
        return $"{Side}, {Phase}: {Message}{hint}";
    }
}

/// <summary>A snapshot of a migration's progress, as <c>query-migrate</c> shows it (qmp 8.7).</summary>
public sealed record MigrationInfo
{
    /// <summary>Status; none before the first migration.</summary>
    public MigrationStatus Status { get; init; }
    /// <summary>True when the figures are those of an incoming migration.</summary>
    public bool IsIncoming { get; init; }
    /// <summary>Time since the start, or the final time, ms.</summary>
    public long TotalTimeMs { get; init; }
    /// <summary>Setup time, ms.</summary>
    public long SetupTimeMs { get; init; }
    /// <summary>Expected downtime, ms; null after the switchover began.</summary>
    public long? ExpectedDowntimeMs { get; init; }
    /// <summary>
    /// Downtime if the VM stopped after the last synchronisation, ms: what was left at the present bandwidth, and another synchronisation. Loading and starting at
    /// the destination come on top. Null before the first one, and after the switchover began.
    /// </summary>
    public double? PredictedDowntimeMs { get; init; }
    /// <summary>
    /// Why the VM has not been stopped yet, only in active: <c>nothing</c> (it is about to stop), <c>bandwidth</c> (not measured yet), <c>size</c> (what is left
    /// does not fit into the downtime limit), <c>stalled</c> (nor did it shrink in the last pass), <c>shrinking</c> (it fits and still shrinks fast),
    /// <c>acknowledgement</c> or <c>answer</c> (the destination's is missing).
    /// </summary>
    public string? SwitchoverWait { get; init; }
    /// <summary>Downtime so far or final, ms; null before the switchover.</summary>
    public double? DowntimeMs { get; init; }
    /// <summary>Bytes of RAM and device state left to send; null when no migration runs.</summary>
    public long? RemainingBytes { get; init; }
    /// <summary>RAM counters; null in setup, failed and cancelled, and on the destination.</summary>
    public RamStats? Ram { get; init; }
    /// <summary>The share of time that the guest sleeps (capability auto-converge), percent; null while it is not throttled.</summary>
    public int? CpuThrottlePercent { get; init; }

    /// <summary>Counters of xbzrle; null without it and where <see cref="Ram"/> is null.</summary>
    internal XbzrleStats? Xbzrle { get; init; }
    /// <summary>Bytes of device data sent by VFIO devices; null without such a device.</summary>
    public long? VfioTransferredBytes { get; init; }
    /// <summary>The breakdown; null before the switchover.</summary>
    public DowntimeReport? Downtime { get; init; }
    /// <summary>The failure; only in failing and failed.</summary>
    public MigrationError? Error { get; init; }
    /// <summary>Reasons that block a migration now.</summary>
    public IReadOnlyList<string> BlockedReasons { get; init; } = [];
    /// <summary>Addresses the destination listens on, until completed.</summary>
    public IReadOnlyList<MigrationAddress> SocketAddresses { get; init; } = [];
}
