using Vmm.Core.Errors;

namespace Vmm.Migration.Update;

/// <summary>
/// Live update: moves a VM from this process into a new one on the same host. RAM and devices stay in place; only their descriptors move
/// (modes cpr-transfer and cpr-exec). One per VM; thread-safe. Call it without the BQL.
/// </summary>
public interface IVmUpdater
{
    /// <summary>Starts the new process, hands the VM over and waits until it runs there. A VM can have one update at a time.</summary>
    /// <param name="options">How to start the new process and how long it may take.</param>
    /// <param name="cancel">Ends the attempt while the VM is still here.</param>
    /// <returns>
    /// The figures of the update; this process should end now. With <see cref="UpdateMethod.Exec"/> a successful update does not return, because the new
    /// program has replaced this one.
    /// </returns>
    /// <exception cref="ConfigurationException">An option is out of range or the program cannot be started; the VM continues here.</exception>
    /// <exception cref="MigrationBlockedException">A blocker forbids the mode; nothing was started.</exception>
    /// <exception cref="VmmException">The update failed. The VM continues here, unless the message says that the new process has it.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired; the VM continues here.</exception>
    Task<UpdateResult> UpdateAsync(UpdateOptions options, CancellationToken cancel = default);
}
