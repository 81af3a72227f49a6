using Vmm.Core.Errors;

namespace Vmm.Migration.Update;

/// <summary>
/// Live update: carries a VM from this process into a new one on the same host. RAM and devices stay where they are; their descriptors move
/// (modes cpr-transfer and cpr-exec). One per VM; thread-safe. Call it without the BQL.
/// </summary>
public interface IVmUpdater
{
    /// <summary>Starts the new process, hands the VM over and waits until it runs there. One update of a VM at a time.</summary>
    /// <param name="options">What the new process is and how long it may take.</param>
    /// <param name="cancel">Ends the attempt while the VM is still here.</param>
    /// <returns>
    /// How the update went; this process then has nothing left to do but to end. With <see cref="UpdateMethod.Exec"/> a successful update does not
    /// return, because this program is no more.
    /// </returns>
    /// <exception cref="VmmException">The update failed, and why. The VM goes on here, unless the message says that the new process has it.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired; the VM goes on here.</exception>
    Task<UpdateResult> UpdateAsync(UpdateOptions options, CancellationToken cancel = default);
}
