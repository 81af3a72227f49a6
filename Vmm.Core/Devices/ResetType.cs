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
