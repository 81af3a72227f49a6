using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Pci;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// An eventfd that a device signals. Each signal calls back with the BQL held, and never after disposal. While a message is set and the accelerator
/// can deliver it, the accelerator turns the signal into that message without this process. BQL: held for every call.
/// </summary>
internal sealed class VfioIrqEvent : IDisposable
{
    private readonly IDeviceServices _services;
    private readonly Action _raise;
    private readonly IMsiRoute? _route;
    private readonly IDisposable _entry;
    private IDisposable? _registration;
    private MsiMessage? _message;
    private bool _listens, _isAway, _disposed;

    /// <summary>Makes an eventfd, or takes over the one of the process before this one.</summary>
    /// <param name="services">The VM's services.</param>
    /// <param name="name">Name in the VM's table of descriptors.</param>
    /// <param name="vector">Number in that table.</param>
    /// <param name="raise">Called for each signal that does not become a message.</param>
    /// <param name="isVector">Whether messages will be set.</param>
    internal VfioIrqEvent(IDeviceServices services, string name, int vector, Action raise, bool isVector = false)
    {
        (_services, _raise) = (services, raise);
        Fd = services.CprFds.Take(name, vector) ?? Posix.EventFd();
        _entry = services.CprFds.Save(name, vector, Fd);
        try
        {
            _route = isVector ? services.Accelerator?.AddMsiRoute(Fd) : null;
            // Until this process has the VM, its signals are for the process that has it.
            if (!services.CprFds.IsIncoming) Listen(true);
        }
        catch
        {
            _route?.Dispose();
            _entry.Dispose();
            Fd.Dispose();
            throw;
        }
    }

    internal OwnedFd Fd { get; }

    /// <summary>Takes signals, or lets them collect in the eventfd.</summary>
    internal void Listen(bool on)
    {
        _listens = on;
        Apply();
    }

    /// <summary>Gives the signals to another reader of the eventfd, or takes them back.</summary>
    internal void LetGo(bool away)
    {
        _isAway = away;
        Apply();
    }

    /// <summary>Sets the message that a signal becomes in the guest; null, as for a masked vector, to be called instead.</summary>
    internal void SetMessage(MsiMessage? message)
    {
        _message = message;
        Apply();
    }

    public void Dispose()
    {
        _disposed = true;
        _registration?.Dispose();
        _route?.Dispose();
        _entry.Dispose();
        Fd.Dispose();
    }

    /// <summary>Lets either this process or the kernel read the eventfd, never both: one stops before the other begins.</summary>
    private void Apply()
    {
        bool isIrqFd = _listens && _route is not null && _message is not null;
        if (!_listens || isIrqFd || _isAway)
        {
            _registration?.Dispose();
            _registration = null;
        }
        _route?.Set(isIrqFd ? _message : null);
        if (_listens && !isIrqFd && !_isAway) _registration ??= _services.EventFds.Add(Fd, OnReadable);
    }

    /// <summary>Raises a signal that has come, without waiting for the event loop.</summary>
    internal void Take()
    {
        // Another reader may have taken the signal since the loop saw it.
        if (_disposed || _registration is null || Posix.Poll(Fd, Posix.POLLIN, null, 0, out _) == 0) return;
        Posix.DrainEventFd(Fd);
        _raise();
    }

    private void OnReadable()
    {
        // Disposal and routing happen under the BQL, so under it the descriptor is open and read here.
        using (_services.Bql.Acquire()) Take();
    }
}
