namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Migration states of a device (uapi: <c>enum vfio_device_mig_state</c>; vfio-migration 2).</summary>
public enum VfioDeviceState : uint
{
    /// <summary>Broken; only a reset leaves it. As a recovery target: reset.</summary>
    Error = 0,
    /// <summary>No DMA, no interrupts, no change.</summary>
    Stop = 1,
    /// <summary>Works; the initial state, and the one after a reset.</summary>
    Running = 2,
    /// <summary>Stopped, its state can be read.</summary>
    StopCopy = 3,
    /// <summary>Stopped, takes state.</summary>
    Resuming = 4,
    /// <summary>Works, but starts no DMA to other devices.</summary>
    RunningP2P = 5,
    /// <summary>Works, its state can be read.</summary>
    PreCopy = 6,
    /// <summary>As <see cref="PreCopy"/>, but starts no DMA to other devices.</summary>
    PreCopyP2P = 7,
}
