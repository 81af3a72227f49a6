namespace Vmm.Core.SaveVm;

/// <summary>How zero pages are found (QEMU: ZeroPageDetection).</summary>
public enum ZeroPageDetection
{
    /// <summary>Every page is data.</summary>
    None,
    /// <summary>On the main channel's thread.</summary>
    Legacy,
    /// <summary>On the multifd threads; without multifd the same as legacy.</summary>
    Multifd,
}

/// <summary>
/// Migration parameters by QEMU's names (qmp 8.6). Immutable: an attempt keeps the record that it was started with, and the engine
/// checks a changed record as a whole before it takes it.
/// </summary>
public sealed record MigrationParameters
{
    /// <summary><c>throttle-trigger-threshold</c>, percent: dirtied bytes of sent ones above which capability auto-converge throttles the guest.</summary>
    public ulong ThrottleTriggerThresholdPercent { get; init; } = 50;

    /// <summary><c>cpu-throttle-initial</c>, percent: the share of time that the guest sleeps at first.</summary>
    public ulong CpuThrottleInitialPercent { get; init; } = 20;

    /// <summary><c>cpu-throttle-increment</c>, percent: what each further step adds.</summary>
    public ulong CpuThrottleIncrementPercent { get; init; } = 10;

    /// <summary><c>cpu-throttle-tailslow</c>: steps are as small as the dirty rate allows.</summary>
    public bool HasCpuThrottleTailslow { get; init; }

    /// <summary><c>max-cpu-throttle</c>, percent: the largest share.</summary>
    public ulong MaxCpuThrottlePercent { get; init; } = 99;

    /// <summary><c>max-bandwidth</c>, bytes/s; 0 is unlimited.</summary>
    public ulong MaxBandwidthBytesPerSecond { get; init; } = 128 << 20;

    /// <summary><c>avail-switchover-bandwidth</c>, bytes/s; 0 means the measured one.</summary>
    public ulong AvailSwitchoverBandwidthBytesPerSecond { get; init; }

    /// <summary><c>downtime-limit</c>, ms.</summary>
    public ulong DowntimeLimitMs { get; init; } = 300;

    /// <summary>
    /// <c>x-downtime-floor</c>: <c>downtime-limit</c> is only the ceiling, and the VM runs on while that makes its downtime shorter at little cost. Off for QEMU's
    /// rule, which stops the VM as soon as the rest fits. Not in QEMU.
    /// </summary>
    public bool HasDowntimeFloor { get; init; } = true;

    /// <summary>
    /// <c>x-downtime-limit-max</c>, ms: the downtime limit doubles after each pass that brings the end no nearer, up to this. 0, or less than
    /// <c>downtime-limit</c>, for a limit that stays. Not in QEMU.
    /// </summary>
    public ulong MaxDowntimeLimitMs { get; init; }

    /// <summary><c>x-precopy-deadline</c>, ms: longest time of a migration until its guest stops; 0 for no limit. Not in QEMU.</summary>
    public ulong PrecopyDeadlineMs { get; init; }

    /// <summary>
    /// <c>x-precopy-deadline-action</c>: what happens then. <c>cancel</c> cancels the migration, and the guest goes on at the source; <c>force</c> stops the guest
    /// and sends the rest, however long that takes. Not in QEMU.
    /// </summary>
    public string PrecopyDeadlineAction { get; init; } = "cancel";

    /// <summary><c>zero-page-detection</c>.</summary>
    public ZeroPageDetection ZeroPageDetection { get; init; } = ZeroPageDetection.Multifd;

    /// <summary><c>multifd-channels</c>: channels beside the main one, 1 to 255; both sides need the same number.</summary>
    public int MultifdChannels { get; init; } = 2;

    /// <summary><c>multifd-compression</c>: <c>none</c>, <c>zlib</c> or <c>zstd</c>; both sides need the same.</summary>
    public string MultifdCompression { get; init; } = "none";

    /// <summary><c>multifd-zlib-level</c>, 0 to 9.</summary>
    public int MultifdZlibLevel { get; init; } = 1;

    /// <summary><c>multifd-zstd-level</c>, 0 to 20.</summary>
    public int MultifdZstdLevel { get; init; } = 1;

    /// <summary>
    /// <c>x-multifd-flush-after-each-section</c>: the channels of multifd synchronise at the end of each section, as QEMU 7.2 needs it (QEMU has a property
    /// <c>multifd-flush-after-each-section</c> instead). Then zero pages go over the main channel.
    /// </summary>
    public bool MultifdFlushAfterEachSection { get; init; }

    /// <summary><c>xbzrle-cache-size</c>, a power of two.</summary>
    public ulong XbzrleCacheSizeBytes { get; init; } = 64 << 20;

    /// <summary><c>mode</c>.</summary>
    public MigrationMode Mode { get; init; } = MigrationMode.Normal;

    /// <summary><c>cpr-exec-command</c>: program and arguments.</summary>
    public IReadOnlyList<string> CprExecCommand { get; init; } = [];

    /// <summary><c>x-setup-timeout</c>, ms: longest time until the peer answers for the first time. Not in QEMU, as all that follow.</summary>
    public ulong SetupTimeoutMs { get; init; } = 30_000;

    /// <summary><c>x-progress-timeout</c>, ms: longest time in which the peer takes, sends or answers nothing while the guest may run at the source.</summary>
    public ulong ProgressTimeoutMs { get; init; } = 30_000;

    /// <summary><c>x-switchover-timeout</c>, ms: longest time in which the destination takes nothing while the guest is stopped.</summary>
    public ulong SwitchoverTimeoutMs { get; init; } = 10_000;

    /// <summary><c>x-confirm-timeout</c>, ms: longest wait of a source that has sent everything for the answer.</summary>
    public ulong ConfirmTimeoutMs { get; init; } = 30_000;

    /// <summary><c>x-final-word-timeout</c>, ms: longest wait of a destination for a source whose guest is stopped: for the next byte, or for the final word.</summary>
    public ulong FinalWordTimeoutMs { get; init; } = 60_000;
}

/// <summary>Migration capabilities by QEMU's names, in its order (qmp 8.5).</summary>
public enum MigrationCapability
{
    /// <summary><c>xbzrle</c>.</summary>
    Xbzrle,
    /// <summary><c>rdma-pin-all</c>.</summary>
    RdmaPinAll,
    /// <summary><c>auto-converge</c>.</summary>
    AutoConverge,
    /// <summary><c>events</c>.</summary>
    Events,
    /// <summary><c>postcopy-ram</c>.</summary>
    PostcopyRam,
    /// <summary><c>x-colo</c>.</summary>
    XColo,
    /// <summary><c>release-ram</c>.</summary>
    ReleaseRam,
    /// <summary><c>return-path</c>.</summary>
    ReturnPath,
    /// <summary><c>pause-before-switchover</c>.</summary>
    PauseBeforeSwitchover,
    /// <summary><c>multifd</c>.</summary>
    Multifd,
    /// <summary><c>dirty-bitmaps</c>.</summary>
    DirtyBitmaps,
    /// <summary><c>postcopy-blocktime</c>.</summary>
    PostcopyBlocktime,
    /// <summary><c>late-block-activate</c>.</summary>
    LateBlockActivate,
    /// <summary><c>x-ignore-shared</c>.</summary>
    XIgnoreShared,
    /// <summary><c>validate-uuid</c>.</summary>
    ValidateUuid,
    /// <summary><c>background-snapshot</c>.</summary>
    BackgroundSnapshot,
    /// <summary><c>zero-copy-send</c>.</summary>
    ZeroCopySend,
    /// <summary><c>postcopy-preempt</c>.</summary>
    PostcopyPreempt,
    /// <summary><c>switchover-ack</c>.</summary>
    SwitchoverAck,
    /// <summary><c>dirty-limit</c>.</summary>
    DirtyLimit,
    /// <summary><c>mapped-ram</c>.</summary>
    MappedRam,
}

/// <summary>The capabilities that are on. Immutable: an attempt keeps the set that it was started with.</summary>
public sealed class MigrationCapabilities
{
    private readonly uint _bits;

    private MigrationCapabilities(uint bits) => _bits = bits;

    /// <summary>All off.</summary>
    public static MigrationCapabilities None { get; } = new(0);

    /// <summary>Makes the set in which exactly these capabilities are on.</summary>
    public static MigrationCapabilities Of(params ReadOnlySpan<MigrationCapability> on)
    {
        uint bits = 0;
        foreach (MigrationCapability capability in on) bits |= 1u << (int)capability;
        return new(bits);
    }

    /// <summary>True if a capability is on.</summary>
    public bool IsOn(MigrationCapability capability) => (_bits & (1u << (int)capability)) != 0;

    /// <summary>A copy of the set in which one capability is on or off.</summary>
    public MigrationCapabilities With(MigrationCapability capability, bool on = true) =>
        new(on ? _bits | (1u << (int)capability) : _bits & ~(1u << (int)capability));
}
