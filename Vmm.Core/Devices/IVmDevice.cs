using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>
/// A device of a VM. Dispose unregisters everything that the device registered. BQL: held, for Dispose too, which therefore must not wait for a thread that may
/// itself wait for the BQL.
/// </summary>
public interface IVmDevice : INamedPart, IDisposable
{
    /// <summary>Why the device is gone, e.g. because the process behind it ended; null while it is there. The guest runs on without it. Any thread.</summary>
    string? LostReason => null;

    /// <summary>Sets the device's power-on state. BQL: held.</summary>
    void Reset();

    /// <summary>
    /// Resets the device for a reason. A device that tells reasons apart overrides this; the others reset the same way each time (QEMU: <c>ResettableClass</c>).
    /// BQL: held.
    /// </summary>
    void Reset(ResetType type) => Reset();
}
