namespace Vmm.Core.Devices;

/// <summary>Reason for a reset (QEMU: <c>ResetType</c>).</summary>
public enum ResetType
{
    /// <summary>Devices return to their power-on state.</summary>
    Cold,
    /// <summary>
    /// A load only checked a stream (<see cref="SaveVm.LoadContext.ValidateOnly"/>), and the states that it overwrote are about to be restored. A device
    /// that the check did not change has nothing to reset.
    /// </summary>
    UndoCheck,
}

/// <summary>
/// A device whose reset depends on the reason; all other devices reset in the same way each time (QEMU: <c>ResettableClass</c>).
/// </summary>
public interface IResetByType
{
    /// <summary>Resets the device. BQL: held.</summary>
    void Reset(ResetType type);
}
