using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;

namespace Vmm.Devices.Vfio.Device;

/// <summary>An eventfd that a device signals. Made and disposed with the BQL held; it raises with the BQL held, and never after disposal.</summary>
internal sealed class VfioIrqEvent : IDisposable
{
    private readonly Bql _bql;
    private readonly Action _raise;
    private readonly IDisposable _registration;
    private bool _disposed;

    internal VfioIrqEvent(IDeviceServices services, Action raise)
    {
        (_bql, _raise) = (services.Bql, raise);
        Fd = Posix.EventFd();
        try
        {
            _registration = services.EventFds.Add(Fd, OnReadable);
        }
        catch
        {
            Fd.Dispose();
            throw;
        }
    }

    internal OwnedFd Fd { get; }

    public void Dispose()
    {
        _disposed = true;
        _registration.Dispose();
        Fd.Dispose();
    }

    private void OnReadable()
    {
        using (_bql.Acquire())
        {
            // Whoever disposes holds the lock, so from here on the descriptor is ours.
            if (_disposed) return;
            Posix.DrainEventFd(Fd);
            _raise();
        }
    }
}
