namespace Vmm.Migration.Snapshot;

/// <summary>What is known of one snapshot.</summary>
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

/// <summary>Snapshots of one VM: save, load, delete, list. One operation at a time; a second one is refused.</summary>
public interface ISnapshotService
{
    /// <summary>Where snapshots are kept, for messages.</summary>
    string Location { get; }

    /// <summary>Saves the VM (QEMU: <c>save_snapshot</c>). A running VM is stopped meanwhile and goes on afterwards. Blocks.</summary>
    /// <param name="name">A new name.</param>
    /// <param name="overwrite">Replace a snapshot of that name; otherwise it is an error.</param>
    /// <param name="progress">Bytes done and total, or null.</param>
    /// <param name="cancel">Cancels; nothing is left behind.</param>
    /// <returns>The manifest.</returns>
    SnapshotManifest Save(string name, bool overwrite, Action<long, long>? progress, CancellationToken cancel);

    /// <summary>Loads a snapshot (QEMU: <c>load_snapshot</c>). The VM ends in the run state it had before, or paused if that was internal-error. A
    /// snapshot that is found bad leaves the VM as it was. Blocks.</summary>
    /// <exception cref="Core.Errors.DeviceStateException">It failed after it had changed the VM, which stays in internal-error: reset it, or load a whole snapshot.</exception>
    /// <param name="name">An existing name.</param>
    /// <param name="progress">Bytes done and total, or null.</param>
    /// <param name="cancel">Cancels; the VM is as it was.</param>
    void Load(string name, Action<long, long>? progress, CancellationToken cancel);

    /// <summary>Deletes a snapshot.</summary>
    /// <param name="name">A name.</param>
    /// <returns>False if there is none of that name.</returns>
    bool Delete(string name);

    /// <summary>All snapshots by time.</summary>
    /// <returns>Manifests; a damaged one is skipped and logged.</returns>
    IReadOnlyList<SnapshotManifest> List();
}
