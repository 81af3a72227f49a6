namespace Vmm.Core.SaveVm;

/// <summary>
/// What one attempt to save is asked to do. Immutable. It is made once per attempt and given to every <see cref="ISavePrepare.SavePrepare"/>; the next
/// attempt gets another one, so nothing has to be reset.
/// </summary>
public sealed record SaveContext
{
    /// <summary>The stream is a snapshot: complete by itself, and the VM goes on here. False for a migration, after which another process has the VM.</summary>
    public bool IsSnapshot { get; init; }

    /// <summary>Which kind of migration; <see cref="MigrationMode.Normal"/> for a snapshot.</summary>
    public MigrationMode Mode { get; init; }

    /// <summary>Capabilities that were on when the attempt began.</summary>
    public MigrationCapabilities Capabilities { get; init; } = MigrationCapabilities.None;

    /// <summary>Parameters in force when the attempt began. The engine itself follows later changes of bandwidth and downtime limits.</summary>
    public MigrationParameters Parameters { get; init; } = new();

    /// <summary>Variant of the framing.</summary>
    internal MigrationCompat Compat { get; init; } = new();

    /// <summary>Channels beside the stream for pages and device state; null when everything goes over the stream.</summary>
    internal IDataChannels? DataChannels { get; init; }

    /// <summary>Device state may go over channels beside the stream; a section that can use them offers <see cref="SaveRoles.CompleteThread"/>.</summary>
    public bool HasDataChannels => DataChannels is { CarriesState: true };

    /// <summary>Fires when the attempt is cancelled or fails.</summary>
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

    /// <summary>Variant of the framing; must equal the sender's.</summary>
    internal MigrationCompat Compat { get; init; } = new();

    /// <summary>
    /// The stream is read only to check it. A section parses all of its body and changes neither RAM nor a real device. Declared states are loaded all the
    /// same; the caller puts them back (<see cref="StateCopy"/>).
    /// </summary>
    public bool ValidateOnly { get; init; }

    /// <summary>Device state may come over channels beside the stream; a section that can take it offers <see cref="LoadRoles.Buffers"/>.</summary>
    public bool HasDataChannels { get; init; }

    /// <summary>
    /// Waits until every data channel has come to the mark that the stream has just delivered (QEMU: <c>multifd_recv_sync_main</c>); null without
    /// channels.
    /// </summary>
    public Action? SyncDataChannels { get; init; }

    /// <summary>
    /// A device calls this each time it has loaded its first data; null while capability switchover-ack is off. BQL: not held
    /// (QEMU: <c>qemu_loadvm_approve_switchover</c>).
    /// </summary>
    public Action? ApproveSwitchover { get; init; }

    /// <summary>Fires when the attempt is given up.</summary>
    public CancellationToken Cancel { get; init; }
}
