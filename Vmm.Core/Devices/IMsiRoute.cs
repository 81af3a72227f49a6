using Vmm.Core.Pci;

namespace Vmm.Core.Devices;

/// <summary>A message-signalled interrupt that an eventfd raises without this process. BQL: held for every call.</summary>
public interface IMsiRoute : IDisposable
{
    /// <summary>
    /// Sets the message and attaches the eventfd, or detaches it. While it is detached, signals of a masked vector stay in the eventfd, where the device
    /// reads them as pending.
    /// </summary>
    /// <param name="message">The message; null to detach.</param>
    void Set(MsiMessage? message);
}
