using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>A device's io that can get a new device behind it after the old one was lost. BQL: held.</summary>
internal interface IVfioReattach
{
    /// <summary>
    /// Connects to the device that is there now, if the old one is lost. It must have the same regions, interrupts and kind of migration. Its state is
    /// its own: the caller resets it, binds its interrupts and maps its areas anew.
    /// </summary>
    /// <exception cref="VmmException">None is there, or another one; the device stays lost.</exception>
    void Reattach();
}
