using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>What runs the guest's instructions.</summary>
public interface IAccelerator : IVmStateHandler, IDisposable
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>When the guest ran last. Exact while the VM is stopped or has just been started. BQL: held.</summary>
    internal GuestRunTimes RunTimes { get; }

    /// <summary>Puts vCPUs and interrupt controllers into their power-on state and leaves memory alone: another state may follow. BQL: held, vCPUs stopped.</summary>
    void Reset();

    /// <summary>Loads the guest's program, as when the machine was switched on; after <see cref="Reset"/>. BQL: held, vCPUs stopped.</summary>
    void LoadProgram();

    /// <summary>
    /// A message that an eventfd raises in the guest without this process; it starts detached. BQL: held, also for the route's members.
    /// </summary>
    /// <param name="trigger">The eventfd; must stay open until the route is disposed. While it is attached, nobody else may read it.</param>
    /// <returns>The route; null when the accelerator has no such way, and the VMM must watch the eventfd itself.</returns>
    IMsiRoute? AddMsiRoute(OwnedFd trigger) => null;

    /// <summary>Lets an eventfd raise a level-triggered line of the PCI bus without this process. BQL: held.</summary>
    /// <param name="line">0 to 3, as in <c>IInterruptController.SetIntx</c>; the levels of both ways add up.</param>
    /// <param name="trigger">The eventfd that raises the line; must stay open until disposal.</param>
    /// <param name="resample">Is signalled when the guest has acknowledged the interrupt and the line was lowered.</param>
    /// <returns>Dispose to detach it, which also lowers the line; null when there is no such way.</returns>
    IDisposable? AddIrqFd(int line, OwnedFd trigger, OwnedFd resample) => null;

    /// <summary>Lets a guest's write signal an eventfd instead of reaching the device. BQL: held.</summary>
    /// <param name="at">Where.</param>
    /// <param name="target">The eventfd; must stay open until disposal.</param>
    /// <returns>Dispose to detach it; null when there is no such way or the place is taken.</returns>
    IDisposable? AddIoEventFd(IoEventFdRange at, OwnedFd target) => null;

    /// <summary>
    /// Shows the registers of a device to the guest as memory, so that its accesses never leave it; what it writes is in no dirty log. BQL: held.
    /// </summary>
    /// <param name="range">Where; page aligned.</param>
    /// <param name="region">The device's mapping, kept alive until disposal.</param>
    /// <param name="offsetBytes">Where in the mapping; page aligned.</param>
    /// <returns>Dispose to take it away, after which the guest's accesses are trapped again; null when they have to be trapped, e.g. over RAM.</returns>
    IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes) => null;
}
