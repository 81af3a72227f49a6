using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;

namespace Vmm.Migration.Engine;

/// <summary>
/// Migration of one VM in both directions: what QMP, the CLI and embedders drive. Thread-safe. Calls return at once; progress is in
/// <see cref="Query"/>, <see cref="StatusChanged"/> and the completion tasks.
/// </summary>
public interface IMigrationEngine
{
    /// <summary>Present status of the outgoing migration, or of the incoming one on a VM that waits for it.</summary>
    MigrationStatus Status { get; }

    /// <summary>
    /// Parameters in force, immutable; assign a changed copy (<c>engine.Parameters = engine.Parameters with { DowntimeLimitMs = 50 }</c>). Bandwidth and
    /// downtime also count for a migration that runs.
    /// </summary>
    /// <exception cref="Core.Errors.ConfigurationException">A value is out of range or not implemented; names the parameter, and nothing is changed.</exception>
    MigrationParameters Parameters { get; set; }

    /// <summary>Capabilities in force, immutable; all are off at first. A migration keeps those that were on when it began.</summary>
    MigrationCapabilities Capabilities { get; }

    /// <summary>Switches capabilities on or off, all together or none (QEMU: <c>migrate-set-capabilities</c>).</summary>
    /// <param name="changes">Capability and new state; others stay as they are.</param>
    /// <exception cref="Core.Errors.ConfigurationException">A capability is not implemented or does not go with another; nothing is changed.</exception>
    void SetCapabilities(IEnumerable<KeyValuePair<MigrationCapability, bool>> changes);

    /// <summary>Changes some parameters at once; all are checked first (QEMU: <c>migrate-set-parameters</c>).</summary>
    internal void SetParameters(IEnumerable<KeyValuePair<MigrationParameter, object>> changes);

    /// <summary>Raised after each status change, on the changing thread.</summary>
    event Action<MigrationStatus>? StatusChanged;

    /// <summary>Raised after each dirty bitmap synchronisation after the first, with its number; source only.</summary>
    event Action<long>? PassCompleted;

    /// <summary>A consistent snapshot of the figures.</summary>
    /// <returns>The figures.</returns>
    MigrationInfo Query();

    /// <summary>Starts an outgoing migration (QEMU: <c>qmp_migrate</c>). The address is parsed and files, fds and commands are opened before this returns; sockets connect later.</summary>
    /// <param name="address">Where to.</param>
    /// <param name="cpr">With mode cpr-transfer, the UNIX socket where the new process takes descriptors; else null.</param>
    /// <returns>Completes when the status is terminal; never faults. The status says how it ended.</returns>
    /// <exception cref="Core.Errors.VmmException">Refused; nothing was started.</exception>
    Task<MigrationStatus> Migrate(MigrationAddress address, MigrationAddress? cpr = null);

    /// <summary>Starts an outgoing migration over a channel that exists already (embedding, tests).</summary>
    /// <param name="channel">The channel; owned by the engine from here on.</param>
    /// <returns>As <see cref="Migrate(MigrationAddress, MigrationAddress)"/>.</returns>
    Task<MigrationStatus> Migrate(Core.Channels.IMigrationChannel channel);

    /// <summary>Waits for and loads an incoming migration (QEMU: <c>qmp_migrate_incoming</c>). The VM must be in state inmigrate.</summary>
    /// <param name="address">Where to listen or read.</param>
    /// <param name="keepListening">After a failed attempt listen again on the same address instead of ending.</param>
    /// <returns>Completes when the status is completed, failed or cancelled; never faults.</returns>
    /// <exception cref="Core.Errors.VmmException">Refused, or the address cannot be listened on.</exception>
    Task<MigrationStatus> MigrateIncoming(MigrationAddress address, bool keepListening = false);

    /// <summary>Loads from a channel that exists already.</summary>
    /// <param name="channel">The channel; owned by the engine from here on.</param>
    /// <returns>As <see cref="MigrateIncoming(MigrationAddress, bool)"/>.</returns>
    Task<MigrationStatus> MigrateIncoming(Core.Channels.IMigrationChannel channel);

    /// <summary>Cancels the outgoing migration, or stops listening; does nothing when idle.</summary>
    void Cancel();

    /// <summary>
    /// Shuts the channels of the running migration at once, so that it fails instead of being cancelled (QEMU: <c>yank</c>); does nothing when
    /// idle. Never blocks and takes no lock that is held while blocking: it runs out-of-band.
    /// </summary>
    void Yank();

    /// <summary>Goes on from pre-switchover (QEMU: <c>qmp_migrate_continue</c>).</summary>
    /// <param name="state">Must equal the present status.</param>
    /// <exception cref="Core.Errors.VmmException">It does not.</exception>
    void Continue(MigrationStatus state);

    /// <summary>Looks up a descriptor for <c>fd:NAME</c>; set by the control plane. Consumes it.</summary>
    Func<string, OwnedFd?>? TakeNamedFd { get; set; }

    /// <summary>
    /// Opens a member of an fd set for <c>file:/dev/fdset/ID</c>, given the id and the access mode (O_RDONLY, O_WRONLY or O_RDWR), which must match
    /// exactly; null if the set has none, an error if there is no such set. Set by the control plane; the result is the caller's.
    /// </summary>
    Func<long, int, OwnedFd?>? OpenFdSet { get; set; }
}
