using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Pci;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// An eventfd that a device signals. It raises with the BQL held, and never after disposal; while a message is set and the accelerator has a way of
/// its own, the signal becomes that message without this process. BQL: held for every call.
/// </summary>
internal sealed class VfioIrqEvent : IDisposable
{
    private readonly IDeviceServices _services;
    private readonly Action _raise;
    private readonly IMsiRoute? _route;
    private IDisposable? _registration;
    private bool _disposed;

    /// <summary>Makes the eventfd.</summary>
    /// <param name="services">The VM's services.</param>
    /// <param name="raise">Called for signals that no message takes.</param>
    /// <param name="isVector">Whether messages will be set.</param>
    internal VfioIrqEvent(IDeviceServices services, Action raise, bool isVector = false)
    {
        (_services, _raise) = (services, raise);
        Fd = Posix.EventFd();
        try
        {
            _registration = services.EventFds.Add(Fd, OnReadable);
            _route = isVector ? services.Accelerator?.AddMsiRoute(Fd) : null;
        }
        catch
        {
            _registration?.Dispose();
            Fd.Dispose();
            throw;
        }
    }

    internal OwnedFd Fd { get; }

    /// <summary>Sets what a signal becomes in the guest; null for a call of ours, as for a masked vector.</summary>
    internal void SetMessage(MsiMessage? message)
    {
        if (_route is null) return;
        if (message is not null)
        {
            _registration?.Dispose();
            _registration = null;
        }
        _route.Set(message);
        if (message is null) _registration ??= _services.EventFds.Add(Fd, OnReadable);
    }

    public void Dispose()
    {
        _disposed = true;
        _registration?.Dispose();
        _route?.Dispose();
        Fd.Dispose();
    }

    private void OnReadable()
    {
        using (_services.Bql.Acquire())
        {
            // Whoever disposes or routes holds the lock, so from here on the descriptor is ours.
            if (_disposed || _registration is null) return;
            Posix.DrainEventFd(Fd);
            _raise();
        }
    }
}
