using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>A device of a VM. Disposing it unregisters everything it registered.</summary>
public interface IVmDevice : INamedPart, IDisposable
{
    /// <summary>Puts the device into its power-on state. BQL: held.</summary>
    void Reset();
}
