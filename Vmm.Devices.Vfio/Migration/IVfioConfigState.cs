using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// The guest-visible PCI function, as the migration code needs it: the content of the CONFIG record (vfio-migration 6), and the settings that a
/// device needs again after a reset. BQL: held.
/// </summary>
internal interface IVfioConfigState
{
    /// <summary>Brings the shadow of config space up to date with the device; called before STOP_COPY, in which the device must not be touched.</summary>
    void ReadShadow();

    /// <summary>
    /// Raises the interrupts that the device signalled before it stopped: a signal that waits in an eventfd is part of no saved state, so the guest
    /// would lose it when it goes on at the destination.
    /// </summary>
    void TakeSignals();

    /// <summary>Writes vmstate <c>VFIOPCIDevice</c> version 1 without name or version. Does not touch the device.</summary>
    void SaveConfig(QemuFileWriter f);

    /// <summary>
    /// Reads what <see cref="SaveConfig"/> wrote, checks it against this device and applies it, the device's command register and interrupts
    /// included.
    /// </summary>
    /// <param name="f">The stream.</param>
    /// <param name="apply">False to read and check only.</param>
    void LoadConfig(QemuFileReader f, bool apply);

    /// <summary>Gives a device that was reset the guest's settings again: command register, MSI or MSI-X, interrupts.</summary>
    void ReapplyAfterReset();
}
