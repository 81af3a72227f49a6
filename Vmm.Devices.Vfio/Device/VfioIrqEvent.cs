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
    private readonly IDisposable _entry;
    private IDisposable? _registration;
    private MsiMessage? _message;
    private bool _listens, _isAway, _disposed;

    /// <summary>Makes one, or takes up the one that the process before this one had.</summary>
    /// <param name="services">The VM's services.</param>
    /// <param name="name">Its name among the VM's descriptors.</param>
    /// <param name="vector">Its number there.</param>
    /// <param name="raise">Called for signals that no message takes.</param>
    /// <param name="isVector">Whether messages will be set.</param>
    internal VfioIrqEvent(IDeviceServices services, string name, int vector, Action raise, bool isVector = false)
    {
        (_services, _raise) = (services, raise);
        Fd = services.CprFds.Take(name, vector) ?? Posix.EventFd();
        _entry = services.CprFds.Save(name, vector, Fd);
        try
        {
            _route = isVector ? services.Accelerator?.AddMsiRoute(Fd) : null;
            // Until the VM is this process's, its signals are for the one that has it.
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

    /// <summary>Leaves the signals to another, who reads the eventfd from here on, or takes them back.</summary>
    internal void LetGo(bool away)
    {
        _isAway = away;
        Apply();
    }

    /// <summary>Sets what a signal becomes in the guest; null for a call of ours, as for a masked vector.</summary>
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

    /// <summary>Exactly one takes the signals, or none: we let go before the kernel begins, and the kernel before we do.</summary>
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

    /// <summary>Raises a signal that has come, without waiting for the loop's turn.</summary>
    internal void Take()
    {
        // Another may have taken it since the loop saw it.
        if (_disposed || _registration is null || Posix.Poll(Fd, Posix.POLLIN, null, 0, out _) == 0) return;
        Posix.DrainEventFd(Fd);
        _raise();
    }

    private void OnReadable()
    {
        // Whoever disposes or routes holds the lock, so behind it the descriptor is ours.
        using (_services.Bql.Acquire()) Take();
    }
}
