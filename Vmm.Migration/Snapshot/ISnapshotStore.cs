namespace Vmm.Migration.Snapshot;

/// <summary>The description of one snapshot, kept in <c>manifest.json</c>.</summary>
public sealed record SnapshotManifest
{
    /// <summary>Name, 1 to 128 characters of letters, digits, <c>-</c>, <c>_</c> and <c>.</c>, not starting with a dot.</summary>
    public required string Name { get; init; }
    /// <summary>When it was taken, UTC.</summary>
    public required DateTimeOffset CreatedUtc { get; init; }
    /// <summary>Machine type.</summary>
    public required string Machine { get; init; }
    /// <summary>Length of the stream.</summary>
    public required long StreamBytes { get; init; }
    /// <summary>Sum of RAM block sizes.</summary>
    public required long RamBytes { get; init; }
    /// <summary>Virtual clock, ns.</summary>
    public required long VmClockNs { get; init; }
    /// <summary>Checksum of the stream, algorithm first, e.g. <c>xxh128:...</c> or <c>sha256:...</c>.</summary>
    public required string Checksum { get; init; }
    /// <summary>Run state before the snapshot stopped the VM.</summary>
    public required string RunState { get; init; }
}

/// <summary>
/// Saves, loads, deletes and lists the snapshots of one VM. One operation at a time: a second one, and a migration, are refused meanwhile. Calls block; make
/// them without the BQL.
/// </summary>
public interface ISnapshotService
{
    /// <summary>The directory of the snapshots, for messages.</summary>
    string Location { get; }

    /// <summary>
    /// Saves the VM (QEMU: <c>save_snapshot</c>). A running VM is stopped meanwhile and goes on afterwards; <c>cont</c>, <c>stop</c> and <c>reset</c>
    /// wait.
    /// </summary>
    /// <param name="name">A new name.</param>
    /// <param name="overwrite">True to replace a snapshot of that name, which is an error otherwise.</param>
    /// <param name="progress">Called with bytes done and total, or null.</param>
    /// <param name="cancel">Cancels; nothing is left behind.</param>
    /// <returns>The manifest.</returns>
    /// <exception cref="Core.Errors.VmmException">
    /// Refused or failed; the VM is as it was, and no snapshot is left behind. If a device kept the guest from going on, the VM is paused and the message
    /// says so, and also whether the snapshot is there.
    /// </exception>
    SnapshotManifest Save(string name, bool overwrite, Action<long, long>? progress, CancellationToken cancel);

    /// <summary>
    /// Loads a snapshot (QEMU: <c>load_snapshot</c>). Afterwards the VM has the run state that it had before, or is paused if that was internal-error or
    /// shutdown, or if a device keeps the guest from going on. The file is checked first: one that is bad leaves the VM as it was.
    /// </summary>
    /// <param name="name">An existing name.</param>
    /// <param name="progress">Called with bytes done and total of the check, or null.</param>
    /// <param name="cancel">Cancels during the check; the VM is as it was.</param>
    /// <exception cref="Core.Errors.DeviceStateException">
    /// It failed after it had changed the VM, which stays in internal-error: reset the VM or load a whole snapshot. Or all of it is loaded, and a device kept
    /// the guest from going on: the VM is paused.
    /// </exception>
    void Load(string name, Action<long, long>? progress, CancellationToken cancel);

    /// <summary>Deletes a snapshot.</summary>
    /// <returns>False if there is none of that name.</returns>
    /// <exception cref="Core.Errors.ConfigurationException">The name is malformed.</exception>
    /// <exception cref="Core.Errors.MigrationBlockedException">A migration or another snapshot operation runs.</exception>
    /// <exception cref="Core.Errors.ChannelException">It cannot be deleted and is still there.</exception>
    bool Delete(string name);

    /// <summary>Lists the manifests of all snapshots, oldest first; a damaged one is logged and left out. Any thread, also while another operation runs.</summary>
    /// <exception cref="Core.Errors.ChannelException">The directory cannot be read.</exception>
    IReadOnlyList<SnapshotManifest> List();
}
