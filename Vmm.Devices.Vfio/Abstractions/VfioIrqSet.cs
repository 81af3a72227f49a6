namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Flags of a SET_IRQS request: one kind of data and one action.</summary>
[Flags]
internal enum VfioIrqSetFlags : uint
{
    /// <summary>No data.</summary>
    DataNone = 1,
    /// <summary>One byte a vector.</summary>
    DataBool = 2,
    /// <summary>One eventfd a vector.</summary>
    DataEventFd = 4,
    /// <summary>Mask.</summary>
    ActionMask = 8,
    /// <summary>Unmask.</summary>
    ActionUnmask = 16,
    /// <summary>Trigger, or bind the eventfds that the device triggers.</summary>
    ActionTrigger = 32,
}

/// <summary>
/// One SET_IRQS request; vectors <paramref name="Start"/> to <paramref name="Start"/> + <paramref name="Count"/> - 1. Trigger without data and with
/// count 0 disables the index.
/// </summary>
/// <param name="Flags">One data flag and one action.</param>
/// <param name="Index">Interrupt index.</param>
/// <param name="Start">First vector.</param>
/// <param name="Count">Vectors.</param>
internal readonly record struct VfioIrqSet(VfioIrqSetFlags Flags, uint Index, uint Start, uint Count);
