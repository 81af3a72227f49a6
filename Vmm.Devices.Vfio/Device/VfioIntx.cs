using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// A device's INTx pin. The device signals once and then masks the pin until it is told to unmask it. There are two ways. By irqfd, the accelerator
/// raises the line; the guest's acknowledgement lowers it and unmasks the pin. By hand, this class raises the line and takes the guest's next
/// access to a BAR as the acknowledgement. By hand is used while the VM is stopped (the level must be known here to be saved), while the guest has
/// the pin disabled, and where the device or the accelerator cannot do the other. BQL: held, except where noted (QEMU:
/// <c>vfio_intx_enable_kvm</c>, <c>vfio_intx_eoi</c>).
/// </summary>
internal sealed class VfioIntx(VfioDeviceAccess access, PciDevice function, IDeviceServices services, bool mayUseIrqFd) : IDisposable
{
    private const VfioIrqSetFlags Bind = VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger;
    private const VfioIrqSetFlags Disabling = VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger;
    private const VfioIrqSetFlags Unmask = VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionUnmask;
    private const VfioIrqSetFlags UnmaskByFd = VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionUnmask;

    private VfioIrqEvent? _event;
    private OwnedFd? _acknowledged;
    private IDisposable? _line, _watch;
    private bool _listens, _isRefused, _isUnmaskBound;
    private volatile bool _pending;

    /// <summary>This class raised the line, and the device's pin is masked until the guest has served it. BQL: not needed.</summary>
    internal bool IsPending => _pending;

    /// <summary>The accelerator raises and lowers the line.</summary>
    internal bool UsesIrqFd => _line is not null;

    /// <summary>Accesses to BARs must come here, because they are taken as acknowledgements.</summary>
    internal bool NeedsTraps => _event is not null && !UsesIrqFd && !IsDisabledByGuest;

    private bool IsDisabledByGuest => (function.Config.Command & PciCommand.IntxDisable) != 0;

    /// <summary>Binds the eventfd.</summary>
    /// <returns>False when the device refused; the pin is then not set up.</returns>
    internal bool Enable()
    {
        _event = new VfioIrqEvent(services, $"{access.Id}_intx-interrupt", 0, OnSignal);
        _listens = !services.CprFds.IsIncoming;
        if (access.SetIrqs(Bind, VfioPciIrq.Intx, 0, 1, _event.Fd) == Errno.None) return true;
        _event.Dispose();
        _event = null;
        return false;
    }

    public void Dispose() => Disable();

    internal void Disable()
    {
        if (_event is null) return;
        Detach();
        access.SetIrqs(Disabling, VfioPciIrq.Intx, 0, 0);
        _pending = false;
        function.SetIntx(false);
        _event.Dispose();
        _event = null;
    }

    /// <summary>Switches to the way that fits now; called after the VM started or stopped, and after writes to configuration space.</summary>
    internal void Follow()
    {
        bool wanted = mayUseIrqFd && !_isRefused && _event is not null && _listens && !access.IsLost && !IsDisabledByGuest && services.RunState.IsRunning;
        if (wanted == UsesIrqFd) return;
        if (wanted) EnableIrqFd();
        else DisableIrqFd();
    }

    /// <summary>Takes signals, or lets them collect in the eventfd.</summary>
    internal void Listen(bool on)
    {
        _listens = on;
        _event?.Listen(on);
        Follow();
    }

    /// <summary>Raises the line if a signal waits in the eventfd.</summary>
    internal void Take()
    {
        Follow();
        _event?.Take();
    }

    /// <summary>Binds the eventfd again, after a reset of the device.</summary>
    internal void Rebind()
    {
        access.SetIrqs(Bind, VfioPciIrq.Intx, 0, 1, _event!.Fd);
        if (!UsesIrqFd) return;
        DisableIrqFd();
        Follow();
    }

    /// <summary>Sets from a loaded state whether the guest has yet to serve the line.</summary>
    internal void LoadPending(bool pending) => _pending = pending && _event is not null;

    /// <summary>Lowers the line and lets the device interrupt again, because the guest has served the pin or is assumed to.</summary>
    internal void Eoi()
    {
        if (!_pending) return;
        _pending = false;
        function.SetIntx(false);
        access.SetIrqs(Unmask, VfioPciIrq.Intx, 0, 1);
    }

    private void OnSignal()
    {
        _pending = true;
        function.SetIntx(true);
    }

    /// <summary>
    /// Sets up the device first, because a refusal then leaves everything as it was. A line that the guest has not served yet is raised again through
    /// its eventfd; the guest's acknowledgement of that unmasks the pin.
    /// </summary>
    private void EnableIrqFd()
    {
        int pin = function.Config.Bytes[PciRegisters.InterruptPin] - 1;
        if (services.Accelerator is not { } accelerator) return;
        try
        {
            _acknowledged = Posix.EventFd();
            Errno errno = BindUnmask(_acknowledged);
            if (errno == Errno.None)
            {
                _event!.LetGo(true);
                _line = accelerator.AddIrqFd(PciHost.Swizzle(function.Address.Slot, pin), _event.Fd, _acknowledged);
                if (_line is null) errno = Errno.EOPNOTSUPP;
            }
            if (errno != Errno.None) GiveUp(errno.ToString());
        }
        catch (VmmException e)
        {
            GiveUp(e.Message);
        }
        if (!UsesIrqFd) return;
        if (_pending)
        {
            _pending = false;
            function.SetIntx(false);
            Posix.SignalEventFd(_event!.Fd);
        }
        else
        {
            access.SetIrqs(Unmask, VfioPciIrq.Intx, 0, 1);
        }
    }

    /// <summary>
    /// Takes the pin back from the accelerator, which lowers the line. A device that still asserts it signals again when it is unmasked; this class
    /// takes that signal.
    /// </summary>
    private void DisableIrqFd()
    {
        Detach();
        _event?.LetGo(false);
        access.SetIrqs(Unmask, VfioPciIrq.Intx, 0, 1);
    }

    private void GiveUp(string why)
    {
        _isRefused = true;
        Detach();
        _event!.LetGo(false);
        VfioLog.IntxWithoutIrqFd(access.Logger, access.Id, why);
    }

    private void Detach()
    {
        if (_acknowledged is null) return;
        _line?.Dispose();
        _line = null;
        if (_isUnmaskBound) access.TrySetIrqs(UnmaskByFd, VfioPciIrq.Intx, 0, 1, (OwnedFd?)null);
        _isUnmaskBound = false;
        _watch?.Dispose();
        _watch = null;
        _acknowledged.Dispose();
        _acknowledged = null;
    }

    /// <summary>A kernel device takes the eventfd; any other gets a message from here instead, if it says that it masks the pin when it signals.</summary>
    private Errno BindUnmask(OwnedFd fd)
    {
        if (!access.Io.TakesUnmaskEventFd)
        {
            if ((access.Io.GetIrqInfo(VfioPciIrq.Intx).Flags & VfioIrqInfoFlags.AutoMasked) == 0) return Errno.EOPNOTSUPP;
            _watch = services.EventFds.Add(fd, OnAcknowledged);
            return Errno.None;
        }
        Errno errno = access.TrySetIrqs(UnmaskByFd, VfioPciIrq.Intx, 0, 1, fd);
        if (errno == Errno.EBUSY)
        {
            // The process that had the device before left an eventfd bound.
            access.TrySetIrqs(UnmaskByFd, VfioPciIrq.Intx, 0, 1, (OwnedFd?)null);
            errno = access.TrySetIrqs(UnmaskByFd, VfioPciIrq.Intx, 0, 1, fd);
        }
        _isUnmaskBound = errno == Errno.None;
        return errno;
    }

    private void OnAcknowledged()
    {
        using (services.Bql.Acquire())
        {
            // Another signal may have come since the loop saw this one.
            if (_acknowledged is null || Posix.Poll(_acknowledged, Posix.POLLIN, null, 0, out _) == 0) return;
            Posix.DrainEventFd(_acknowledged);
            access.SetIrqs(Unmask, VfioPciIrq.Intx, 0, 1);
        }
    }
}
