using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

/// <summary>The kind of interrupts that a device is set up for.</summary>
internal enum VfioIrqMode
{
    None,
    Intx,
    Msi,
    Msix,
}

/// <summary>
/// Interrupts of a device, each an eventfd, set up by SET_IRQS in QEMU's order: INTx goes off before MSI or MSI-X goes on, and comes back after
/// it has gone off. BQL: held for every call (QEMU: <c>vfio_intx_*</c>, <c>vfio_msi_*</c>, <c>vfio_msix_*</c>).
/// </summary>
internal sealed class VfioIrqs(VfioDeviceAccess access, PciDevice function, IDeviceServices services, bool mayUseIrqFd) : IMsixVectorNotifier, IDisposable
{
    private const VfioIrqSetFlags Bind = VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger;
    private const VfioIrqSetFlags Disable = VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger;

    private readonly VfioIntx _intx = new(access, function, services, mayUseIrqFd);
    private VfioIrqEvent?[] _vectors = [];
    private int _used;
    private bool _batch, _grown, _touched;

    internal VfioIrqMode Mode { get; private set; }

    /// <summary>See <see cref="VfioIntx.IsPending"/>. BQL: not needed.</summary>
    internal bool IsIntxPending => _intx.IsPending;

    /// <summary>See <see cref="VfioIntx.NeedsTraps"/>.</summary>
    internal bool NeedsTraps => _intx.NeedsTraps;

    /// <summary>See <see cref="VfioIntx.UsesIrqFd"/>.</summary>
    internal bool IntxUsesIrqFd => _intx.UsesIrqFd;

    /// <summary>Sets up the pin, if there is one.</summary>
    /// <returns>False when the device refused; the function then has no interrupts.</returns>
    internal bool EnableIntx()
    {
        if (function.Config.Bytes[PciRegisters.InterruptPin] == 0 || access.Io.GetIrqInfo(VfioPciIrq.Intx).Count == 0) return true;
        DisableAll();
        if (!_intx.Enable()) return false;
        Mode = VfioIrqMode.Intx;
        return true;
    }

    public void Dispose()
    {
        DisableAll();
        _intx.Dispose();
    }

    /// <summary>Turns everything off.</summary>
    internal void DisableAll()
    {
        if (Mode == VfioIrqMode.Intx)
        {
            _intx.Disable();
        }
        else if (Mode != VfioIrqMode.None)
        {
            bool msix = Mode == VfioIrqMode.Msix;
            if (msix) function.Msix!.SetNotifier(null);
            for (int v = 0; msix && v < _used; v++)
                if (_vectors[v] is not null) function.Msix!.ClearPending(v);
            access.SetIrqs(Disable, msix ? VfioPciIrq.Msix : VfioPciIrq.Msi, 0, 0);
            DropVectors();
        }
        Mode = VfioIrqMode.None;
    }

    /// <summary>Follows the enable bits after a write to them.</summary>
    internal void Follow(bool wasMsi, bool wasMsix)
    {
        bool msi = function.Msi?.IsEnabled == true, msix = function.Msix?.IsEnabled == true;
        if (msi == wasMsi && msix == wasMsix) return;
        if (msi && !wasMsi) Try(EnableMsi);
        else if (msix && !wasMsix) Try(EnableMsix);
        else if ((wasMsi && !msi && Mode != VfioIrqMode.Msix) || (wasMsix && !msix && Mode != VfioIrqMode.Msi))
        {
            // Also when the device refused the messages, because the guest's driver then falls back to the pin.
            DisableAll();
            Try(() => EnableIntx());
        }
    }

    /// <summary>Sets up what the configuration space asks for, after it was loaded.</summary>
    internal void EnableByConfig()
    {
        if (function.Msi?.IsEnabled == true) Try(EnableMsi);
        else if (function.Msix?.IsEnabled == true) Try(EnableMsix);
        else Try(() => EnableIntx());
        // The line was loaded asserted: the guest's next access must lower it and let the device interrupt again.
        if (function.IsIntxAsserted) _intx.LoadPending(true);
    }

    /// <summary>Binds all eventfds again, after a reset of the device.</summary>
    internal void Rebind()
    {
        switch (Mode)
        {
            case VfioIrqMode.Intx: _intx.Rebind(); break;
            case VfioIrqMode.Msi: BindVectors(VfioPciIrq.Msi); break;
            case VfioIrqMode.Msix: BindMsix(); break;
        }
    }

    /// <summary>Collects changes of vectors until <see cref="EndBatch"/>, which sends them to the device in one request.</summary>
    internal void BeginBatch() => (_batch, _grown, _touched) = (true, false, false);

    internal void EndBatch()
    {
        _batch = false;
        if (!_touched || Mode != VfioIrqMode.Msix) return;
        if (_grown && CannotGrow) access.SetIrqs(Disable, VfioPciIrq.Msix, 0, 0);
        BindVectors(VfioPciIrq.Msix);
    }

    /// <summary>
    /// Follows masks, messages and bus mastering: a vector that may reach the guest now is delivered by irqfd; every other one comes here and
    /// becomes pending (QEMU: <c>vfio_update_kvm_msi_virq</c>).
    /// </summary>
    internal void UpdateMessages()
    {
        if (Mode is not (VfioIrqMode.Msi or VfioIrqMode.Msix)) return;
        for (int v = 0; v < _used; v++)
        {
            bool isOpen = function.IsBusMaster && (Mode == VfioIrqMode.Msi ? !function.Msi!.IsMasked(v) : !function.Msix!.IsMasked(v));
            _vectors[v]?.SetMessage(!isOpen ? null : Mode == VfioIrqMode.Msi ? function.Msi!.Message(v) : function.Msix!.Message(v));
        }
    }

    /// <summary>See <see cref="VfioIntx.Eoi"/>.</summary>
    internal void IntxEoi() => _intx.Eoi();

    /// <summary>See <see cref="VfioIntx.Follow"/>.</summary>
    internal void FollowIntx() => _intx.Follow();

    void IMsixVectorNotifier.UseVector(int vector, MsiMessage message)
    {
        if (Mode != VfioIrqMode.Msix) return;
        try
        {
            _vectors[vector] ??= Vector(vector, () => function.Msix!.Notify(vector));
        }
        catch (ChannelException e)
        {
            VfioLog.InterruptsNotSetUp(access.Logger, access.Id, e.Message);
            return;
        }
        bool grows = vector >= _used;
        _used = Math.Max(_used, vector + 1);
        if (_batch)
        {
            (_touched, _grown) = (true, _grown || grows);
        }
        else if (grows && CannotGrow)
        {
            access.SetIrqs(Disable, VfioPciIrq.Msix, 0, 0);
            BindVectors(VfioPciIrq.Msix);
        }
        else
        {
            access.SetIrqs(Bind, VfioPciIrq.Msix, (uint)vector, 1, _vectors[vector]!.Fd);
        }
        if (!_batch) UpdateMessages();
    }

    /// <summary>The device is not told: a masked vector goes on signalling, and becomes pending here.</summary>
    void IMsixVectorNotifier.ReleaseVector(int vector)
    {
        if (!_batch) UpdateMessages();
    }

    private bool CannotGrow => (access.Io.GetIrqInfo(VfioPciIrq.Msix).Flags & VfioIrqInfoFlags.NoResize) != 0;

    private string VectorName => $"{access.Id}_interrupt";

    private VfioIrqEvent Vector(int vector, Action raise) => new(services, VectorName, vector, raise, isVector: true);

    /// <summary>Takes signals, or lets them collect in the eventfds.</summary>
    internal void Listen(bool on)
    {
        _intx.Listen(on);
        foreach (VfioIrqEvent? vector in _vectors) vector?.Listen(on);
    }

    /// <summary>Raises the signals that wait in the eventfds.</summary>
    internal void TakeSignals()
    {
        _intx.Take();
        foreach (VfioIrqEvent? vector in _vectors) vector?.Take();
    }

    /// <summary>Sets from another process's state whether the pin is pending.</summary>
    internal void LoadIntxPending(bool pending) => _intx.LoadPending(pending);

    private void EnableMsi()
    {
        DisableAll();
        int count = function.Msi!.Vectors;
        _vectors = new VfioIrqEvent?[count];
        for (_used = 0; _used < count; _used++)
        {
            int vector = _used;
            _vectors[vector] = Vector(vector, () => function.Msi!.Notify(vector));
        }
        Mode = VfioIrqMode.Msi;
        if (BindVectors(VfioPciIrq.Msi) == Errno.None) return;
        // As QEMU does: the function stays without interrupts, and its driver may fall back.
        DropVectors();
        Mode = VfioIrqMode.None;
    }

    private void EnableMsix()
    {
        DisableAll();
        _vectors = new VfioIrqEvent?[function.Msix!.Vectors];
        _used = 0;
        // The device already signals these vectors, masked or not (vfio-migration 7.6).
        for (int v = 0; v < _vectors.Length; v++)
        {
            int vector = v;
            if (!services.CprFds.Has(VectorName, v)) continue;
            _vectors[v] = Vector(vector, () => function.Msix!.Notify(vector));
            _used = v + 1;
        }
        Mode = VfioIrqMode.Msix;
        _batch = true;
        function.Msix.SetNotifier(this);
        _batch = false;
        BindMsix();
    }

    private void BindMsix()
    {
        // With no vector in use, a request that unbinds vector 0 still makes the kernel set the device's enable bit (vfio-migration 6).
        if (_used > 0) BindVectors(VfioPciIrq.Msix);
        else access.SetIrqs(Bind, VfioPciIrq.Msix, 0, 1, (OwnedFd?)null);
    }

    private Errno BindVectors(uint index)
    {
        var fds = new OwnedFd?[_used];
        for (int v = 0; v < _used; v++) fds[v] = _vectors[v]?.Fd;
        return access.SetIrqs(Bind, index, 0, (uint)_used, fds);
    }

    private void DropVectors()
    {
        foreach (VfioIrqEvent? vector in _vectors) vector?.Dispose();
        (_vectors, _used) = ([], 0);
    }

    /// <summary>When descriptors run out, the guest loses these interrupts but the VM goes on.</summary>
    private void Try(Action enable)
    {
        try
        {
            enable();
        }
        catch (ChannelException e)
        {
            DropVectors();
            Mode = VfioIrqMode.None;
            VfioLog.InterruptsNotSetUp(access.Logger, access.Id, e.Message);
        }
    }
}
