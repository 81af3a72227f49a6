using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;

namespace Vmm.Migration.Engine;

/// <summary>
/// Migrates one VM, in both directions. Thread-safe. Calls return at once; <see cref="Query"/>, <see cref="StatusChanged"/> and the returned tasks
/// show the progress. BQL: not held, because a migration that ends may need it.
/// </summary>
public interface IMigrationEngine
{
    /// <summary>Status of the last outgoing migration, or of the incoming one on a VM that waits for it.</summary>
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

    /// <summary>Raised after each status change, on the changing thread, with or without the BQL. A handler must not wait for the migration.</summary>
    event Action<MigrationStatus>? StatusChanged;

    /// <summary>Raised after each dirty bitmap synchronisation after the first, with its number; source only, on the migration's thread. BQL: not held.</summary>
    event Action<long>? PassCompleted;

    /// <summary>All figures at one moment.</summary>
    MigrationInfo Query();

    /// <summary>
    /// Starts an outgoing migration (QEMU: <c>qmp_migrate</c>). Files, descriptors and commands are opened before this returns; sockets connect later.
    /// </summary>
    /// <param name="address">Where to.</param>
    /// <param name="cpr">With mode cpr-transfer, the UNIX socket where the new process takes descriptors; else null.</param>
    /// <returns>Completes with the terminal status; never faults.</returns>
    /// <exception cref="Core.Errors.MigrationBlockedException">A blocker, or another migration or snapshot; nothing was started.</exception>
    /// <exception cref="Core.Errors.DeviceStateException">The run state does not allow it; nothing was started.</exception>
    /// <exception cref="Core.Errors.ConfigurationException">The mode or a parameter does not go with the address; nothing was started.</exception>
    /// <exception cref="Core.Errors.ChannelException">The file, descriptor or command cannot be opened.</exception>
    Task<MigrationStatus> Migrate(MigrationAddress address, MigrationAddress? cpr = null);

    /// <summary>Starts an outgoing migration over a channel that exists already, for embedders and tests.</summary>
    /// <param name="channel">The engine owns it from then on.</param>
    /// <returns>As <see cref="Migrate(MigrationAddress, MigrationAddress)"/>.</returns>
    /// <exception cref="Core.Errors.VmmException">As <see cref="Migrate(MigrationAddress, MigrationAddress)"/>.</exception>
    Task<MigrationStatus> Migrate(Core.Channels.IMigrationChannel channel);

    /// <summary>Waits for and loads an incoming migration (QEMU: <c>qmp_migrate_incoming</c>). The VM must be in state inmigrate.</summary>
    /// <param name="address">Where to listen or read.</param>
    /// <param name="keepListening">True to listen again on the same address after a failed attempt.</param>
    /// <returns>Completes when the status is completed, failed or cancelled; never faults.</returns>
    /// <exception cref="Core.Errors.VmmException">Refused, or the address cannot be listened on.</exception>
    Task<MigrationStatus> MigrateIncoming(MigrationAddress address, bool keepListening = false);

    /// <summary>Loads from a channel that exists already.</summary>
    /// <param name="channel">The engine owns it from then on.</param>
    /// <returns>As <see cref="MigrateIncoming(MigrationAddress, bool)"/>.</returns>
    /// <exception cref="Core.Errors.VmmException">Refused; the channel stays the caller's.</exception>
    Task<MigrationStatus> MigrateIncoming(Core.Channels.IMigrationChannel channel);

    /// <summary>Cancels the outgoing or incoming migration, or stops listening; does nothing when idle. Does not wait for the end.</summary>
    void Cancel();

    /// <summary>
    /// Shuts the channels of the running migration at once: the migration fails and is not cancelled (QEMU: <c>yank</c>). Does nothing when idle. It never
    /// blocks, because it runs out-of-band, and takes no lock that another thread may hold while it blocks.
    /// </summary>
    void Yank();

    /// <summary>Lets a migration that waits in pre-switchover go on (QEMU: <c>qmp_migrate_continue</c>).</summary>
    /// <param name="state">Must be pre-switchover and the status in force.</param>
    /// <exception cref="Core.Errors.VmmException">It is not.</exception>
    void Continue(MigrationStatus state);

    /// <summary>
    /// Takes the descriptor of <c>fd:NAME</c> out of the control plane, which sets this; null if there is none of that name. Called on the thread that starts a
    /// migration.
    /// </summary>
    Func<string, OwnedFd?>? TakeNamedFd { get; set; }

    /// <summary>
    /// Opens a member of an fd set for <c>file:/dev/fdset/ID</c>, given the id and the access mode (O_RDONLY, O_WRONLY or O_RDWR), which must match
    /// exactly. Returns null if the set has no such member and throws if there is no such set. The caller owns the result. Set by the control plane.
    /// </summary>
    Func<long, int, OwnedFd?>? OpenFdSet { get; set; }
}
