namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Interrupt info flags (uapi: <c>VFIO_IRQ_INFO_*</c>).</summary>
[Flags]
public enum VfioIrqInfoFlags : uint
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>Signals an eventfd.</summary>
    EventFd = 1,
    /// <summary>Can be masked.</summary>
    Maskable = 2,
    /// <summary>Masks itself when it fires.</summary>
    AutoMasked = 4,
    /// <summary>The number of vectors in use cannot grow.</summary>
    NoResize = 8,
}

/// <summary>Interrupt info.</summary>
/// <param name="Flags">What the interrupt supports.</param>
/// <param name="Count">Number of vectors; 0 when the device has no such interrupt.</param>
internal readonly record struct VfioIrqInfo(VfioIrqInfoFlags Flags, uint Count);
