namespace Vmm.Core.Devices;

/// <summary>Why devices are reset (QEMU: <c>ResetType</c>).</summary>
public enum ResetType
{
    /// <summary>Power-on state.</summary>
    Cold,
    /// <summary>
    /// A stream was only checked (<see cref="SaveVm.LoadContext.ValidateOnly"/>), and declared states that it overwrote are about to be put back.
    /// A device that left itself alone during the check has nothing to reset.
    /// </summary>
    UndoCheck,
}

/// <summary>A device that tells one reset from another; the others are reset the same way each time (QEMU: <c>ResettableClass</c>).</summary>
public interface IResetByType
{
    /// <summary>Resets the device. BQL: held.</summary>
    /// <param name="type">Why.</param>
    void Reset(ResetType type);
}
