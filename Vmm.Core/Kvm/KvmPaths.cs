using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;

namespace Vmm.Core.Kvm;

/// <summary>
/// Paths between the guest and a device that bypass this process: message routes, irqfds, ioeventfds and slots for device memory. The caller disposes
/// each path before the VM. BQL: held for every call.
/// </summary>
internal sealed class KvmPaths
{
    private const ulong PageMask = RamBlock.PageSize - 1;

    private readonly KvmVm _vm;
    private readonly SortedDictionary<uint, MsiMessage> _routes = [];
    private readonly HashSet<uint> _taken = [];
    private readonly uint _end;

    internal KvmPaths(KvmVm vm)
    {
        _vm = vm;
        _end = (uint)vm.System.Extension(KvmUapi.KVM_CAP_IRQ_ROUTING);
        _vm.SetMsiRoutes(_routes); // Replaces the kernel's default routes, which connect the PIT to pin 0.
    }

    /// <summary>Number of interrupt numbers in use, for tests.</summary>
    internal int RouteCount => _taken.Count;

    internal IMsiRoute? AddMsiRoute(OwnedFd trigger)
    {
        uint gsi = KvmVm.IrqChipPins;
        while (_taken.Contains(gsi)) gsi++;
        // The reserve is for the pins, each of which may have two entries in the table.
        if (gsi + KvmVm.IrqChipPins >= _end) return null;
        _taken.Add(gsi);
        return new MsiRoute(this, gsi, trigger);
    }

    internal IDisposable? AddIoEventFd(IoEventFdRange at, OwnedFd target)
    {
        if (at.SizeBytes is not (0 or 1 or 2 or 4 or 8) || (at.SizeBytes == 0 && (at.IsPort || at.Match is not null)))
            throw new ArgumentException($"an ioeventfd of {at.SizeBytes} bytes at 0x{at.Address:x}", nameof(at));
        try
        {
            return _vm.AttachIoeventfd(at.Address, at.SizeBytes, at.IsPort, target, at.Match);
        }
        catch (KvmException e) when (e.Errno == Errno.EEXIST)
        {
            return null;
        }
    }

    internal IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes)
    {
        if (offsetBytes > region.LengthBytes || range.LengthBytes > region.LengthBytes - offsetBytes)
            throw new ArgumentOutOfRangeException(nameof(range), $"{range.LengthBytes} bytes at {offsetBytes} of a mapping of {region.LengthBytes}");
        if (range.LengthBytes == 0 || ((range.Start.Value | range.LengthBytes | offsetBytes) & PageMask) != 0) return null;
        bool held = false;
        region.DangerousAddRef(ref held);
        try
        {
            _vm.AddSlot(range, region.DangerousGetHandle() + (nint)offsetBytes, isReadOnly: !region.IsWritable, isRam: false);
        }
        catch (KvmException e) when (e.Errno is Errno.EEXIST or Errno.EINVAL)
        {
            // The range overlaps RAM or another BAR, or no slot is free: KVM then traps the access, and the bus decides which device answers.
            region.DangerousRelease();
            return null;
        }
        catch
        {
            region.DangerousRelease();
            throw;
        }
        return new Registration(() =>
        {
            _vm.RemoveSlot(range);
            region.DangerousRelease();
        });
    }

    private void Route(uint gsi, MsiMessage? message)
    {
        if (message is { } m) _routes[gsi] = m;
        else if (!_routes.Remove(gsi)) return;
        _vm.SetMsiRoutes(_routes);
    }

    private sealed class MsiRoute(KvmPaths owner, uint gsi, OwnedFd trigger) : IMsiRoute
    {
        private IDisposable? _irqfd;
        private MsiMessage? _message;
        private bool _disposed;

        public void Set(MsiMessage? message)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (message == _message) return;
            if (message is null) Detach();
            owner.Route(gsi, message);
            _message = message;
            if (message is not null) _irqfd ??= owner._vm.AttachIrqfd(gsi, trigger);
        }

        public void Dispose()
        {
            if (_disposed) return;
            Set(null);
            _disposed = true;
            owner._taken.Remove(gsi);
        }

        private void Detach()
        {
            _irqfd?.Dispose();
            _irqfd = null;
        }
    }
}
