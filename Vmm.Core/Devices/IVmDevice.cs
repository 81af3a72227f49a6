using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>A device of a VM. Dispose unregisters everything that the device registered.</summary>
public interface IVmDevice : INamedPart, IDisposable
{
    /// <summary>Sets the device's power-on state. BQL: held.</summary>
    void Reset();
}
