namespace Vmm.Core.SaveVm;

/// <summary>
/// What one attempt to save is asked to do. Immutable; made once per attempt, given to every <see cref="ISavePrepare.SavePrepare"/>, and gone with
/// the attempt, so that nothing has to be reset for the next one.
/// </summary>
public sealed record SaveContext
{
    /// <summary>The stream is a snapshot: complete by itself, and the VM goes on here. False for a migration, after which another process has the VM.</summary>
    public bool IsSnapshot { get; init; }

    /// <summary>Which kind of migration; <see cref="MigrationMode.Normal"/> for a snapshot.</summary>
    public MigrationMode Mode { get; init; }

    /// <summary>Capabilities that were on when the attempt began.</summary>
    public MigrationCapabilities Capabilities { get; init; } = MigrationCapabilities.None;

    /// <summary>Parameters in force when the attempt began. Pacing (bandwidth, downtime) is the engine's and may change meanwhile.</summary>
    public MigrationParameters Parameters { get; init; } = new();

    /// <summary>Framing choices.</summary>
    internal MigrationCompat Compat { get; init; } = new();

    /// <summary>Channels beside the stream for pages and for device state; null when everything goes over the stream.</summary>
    internal IDataChannels? DataChannels { get; init; }

    /// <summary>Device state may go over channels beside the stream: a handler that can use them offers <see cref="SaveRoles.CompleteThread"/>.</summary>
    public bool HasDataChannels => DataChannels is not null;

    /// <summary>Set when the attempt is being cancelled or has failed.</summary>
    public CancellationToken Cancel { get; init; }
}

/// <summary>What one attempt to load is asked to do. Immutable; made once per attempt and given to every <see cref="ILoadSetup.LoadSetup"/>.</summary>
public sealed record LoadContext
{
    /// <summary>The stream is a snapshot: complete by itself, and the VM goes on here. False for a migration, after which another process has the VM.</summary>
    public bool IsSnapshot { get; init; }

    /// <summary>
    /// Which kind of migration, as far as this side knows: <see cref="MigrationMode.CprTransfer"/> when memory and descriptors came from another
    /// process, <see cref="MigrationMode.Normal"/> otherwise.
    /// </summary>
    public MigrationMode Mode { get; init; }

    /// <summary>Capabilities that were on when the attempt began.</summary>
    public MigrationCapabilities Capabilities { get; init; } = MigrationCapabilities.None;

    /// <summary>Framing choices; must equal the sender's.</summary>
    internal MigrationCompat Compat { get; init; } = new();

    /// <summary>
    /// The stream is read only to see whether it is whole: a handler parses and checks all of it and leaves what it would have to throw away (RAM,
    /// a real device) alone. Declared states are loaded all the same; whoever validates puts them back.
    /// </summary>
    public bool ValidateOnly { get; init; }

    /// <summary>Device state may come over channels beside the stream: a handler that can take it offers <see cref="LoadRoles.Buffers"/>.</summary>
    public bool HasDataChannels { get; init; }

    /// <summary>Waits until every data channel has come to the mark that was just read (QEMU: <c>multifd_recv_sync_main</c>); null without channels.</summary>
    public Action? SyncDataChannels { get; init; }

    /// <summary>
    /// A device calls this, without the BQL, for each first part that it has loaded; null while capability switchover-ack is off (QEMU:
    /// <c>qemu_loadvm_approve_switchover</c>).
    /// </summary>
    public Action? ApproveSwitchover { get; init; }

    /// <summary>Set when the attempt is being given up.</summary>
    public CancellationToken Cancel { get; init; }
}
