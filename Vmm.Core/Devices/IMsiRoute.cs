using Vmm.Core.Pci;

namespace Vmm.Core.Devices;

/// <summary>A message-signalled interrupt that an eventfd raises without this process. BQL: held for every call.</summary>
public interface IMsiRoute : IDisposable
{
    /// <summary>Sets the message and attaches the eventfd, or detaches it: a masked vector's signals then stay in the eventfd, to be read as pending.</summary>
    /// <param name="message">The message, or null to detach.</param>
    void Set(MsiMessage? message);
}
