using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>
/// Runs the guest's instructions, and offers devices direct paths to the guest. BQL: held, for Dispose too. Every call may throw
/// <see cref="Errors.KvmException"/>, or another <see cref="Errors.VmmException"/> of the accelerator, when the host refuses.
/// </summary>
public interface IAccelerator : IVmStateHandler, IDisposable
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>Times at which the guest last ran. Exact while the VM is stopped or has just been started. BQL: held.</summary>
    internal GuestRunTimes RunTimes { get; }

    /// <summary>Sets the power-on state of vCPUs and interrupt controllers; memory stays, because a load may follow. BQL: held, vCPUs stopped.</summary>
    void Reset();

    /// <summary>Copies the guest's program into RAM, after <see cref="Reset"/>. BQL: held, vCPUs stopped.</summary>
    void LoadProgram();

    /// <summary>
    /// Adds a route: a message that an eventfd raises in the guest without this process. The route starts detached. BQL: held, also for the route's members.
    /// </summary>
    /// <param name="trigger">The eventfd; must stay open until the route is disposed. While it is attached, nobody else may read it.</param>
    /// <returns>The route; null if the accelerator has no routes, so that the device must watch the eventfd itself.</returns>
    IMsiRoute? AddMsiRoute(OwnedFd trigger) => null;

    /// <summary>Attaches an eventfd that raises a level-triggered line of the PCI bus without this process. BQL: held.</summary>
    /// <param name="line">0 to 3, as in <c>IInterruptController.SetIntx</c>; the line is asserted while either of the two asserts it.</param>
    /// <param name="trigger">A signal on it raises the line; must stay open until disposal.</param>
    /// <param name="resample">Signalled after the guest has acknowledged the interrupt and the line was lowered.</param>
    /// <returns>Dispose to detach, which also lowers the line; null if the accelerator has no such path.</returns>
    /// <exception cref="ArgumentOutOfRangeException">There is no such line.</exception>
    IDisposable? AddIrqFd(int line, OwnedFd trigger, OwnedFd resample) => null;

    /// <summary>Attaches an eventfd that a guest's write signals instead of reaching the device. BQL: held.</summary>
    /// <param name="at">The writes that signal.</param>
    /// <param name="target">The eventfd; must stay open until disposal.</param>
    /// <returns>Dispose to detach; null if the accelerator has no such path or another eventfd has these writes.</returns>
    internal IDisposable? AddIoEventFd(IoEventFdRange at, OwnedFd target) => null;

    /// <summary>
    /// Maps a device's registers into the guest, so that accesses do not leave the guest. The dirty log does not contain the guest's writes. BQL: held.
    /// </summary>
    /// <param name="range">Guest-physical range, page-aligned.</param>
    /// <param name="region">The device's mapping, kept alive until disposal.</param>
    /// <param name="offsetBytes">Offset of the range in the mapping, page-aligned.</param>
    /// <returns>Dispose to unmap, after which accesses are trapped again; null if they must be trapped, e.g. because the range overlaps RAM.</returns>
    IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes) => null;
}
