using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The guest-visible PCI function, as the migration code needs it: what travels in the CONFIG record (vfio-migration 6) and what must be
/// told to the device again after it was reset. BQL: held.
/// </summary>
internal interface IVfioConfigState
{
    /// <summary>Brings the shadow of config space up to date with the device; called before STOP_COPY, in which the device must not be touched.</summary>
    void ReadShadow();

    /// <summary>
    /// Gives the guest what the device signalled before it stopped: a signal that waits in an eventfd is in nobody's state, and would be lost to a
    /// guest that goes on elsewhere.
    /// </summary>
    void TakeSignals();

    /// <summary>Writes vmstate <c>VFIOPCIDevice</c> version 1 without name or version. Does not touch the device.</summary>
    /// <param name="f">The stream.</param>
    void SaveConfig(QemuFileWriter f);

    /// <summary>Reads what <see cref="SaveConfig"/> wrote, checks it against this device and applies it, the device's command register and interrupts included.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="apply">False to read and check only.</param>
    void LoadConfig(QemuFileReader f, bool apply);

    /// <summary>Tells a device that was reset what the guest had set: command register, MSI or MSI-X, interrupts.</summary>
    void ReapplyAfterReset();
}
