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
    /// <summary><c>max-bandwidth</c>, bytes/s; 0 is unlimited.</summary>
    public ulong MaxBandwidthBytesPerSecond { get; init; } = 128 << 20;

    /// <summary><c>avail-switchover-bandwidth</c>, bytes/s; 0 means the measured one.</summary>
    public ulong AvailSwitchoverBandwidthBytesPerSecond { get; init; }

    /// <summary><c>downtime-limit</c>, ms.</summary>
    public ulong DowntimeLimitMs { get; init; } = 300;

    /// <summary><c>zero-page-detection</c>.</summary>
    public ZeroPageDetection ZeroPageDetection { get; init; } = ZeroPageDetection.Multifd;

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
