using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// A container that changes process. Its mappings stay; the old process withdraws the virtual addresses behind them, and the new process sets its
/// own (vfio-migration 7.5, 7.6; QEMU: <c>vfio_cpr_unmap_vaddr_all</c>, <c>vfio_legacy_cpr_dma_map</c>). BQL: held for every call.
/// </summary>
internal sealed partial class Type1Container
{
    /// <summary>Most times that the old process takes one mapping back from the new one, which sets each mapping only once; two are enough.</summary>
    private const int MaxTakes = 3;

    private bool _suspended;
    private bool _arriving;

    /// <summary>Why the container cannot change process, or null.</summary>
    internal string? CprBlockedReason =>
        !HasExtension(VfioUapi.VFIO_UPDATE_VADDR) ? "the kernel's container does not support VFIO_UPDATE_VADDR"
        : !HasExtension(VfioUapi.VFIO_UNMAP_ALL) ? "the kernel's container does not support VFIO_UNMAP_ALL"
        : null;

    /// <summary>Takes over a container that another process has set up. RAM is noted, not mapped, until <see cref="TakeAddresses"/>.</summary>
    internal static Type1Container Inherit(OwnedFd fd, IVfioKernel kernel, ILogger logger) =>
        new(fd, kernel, "type1 container", logger) { _arriving = true, _suspended = true, LeavesMappingsAlone = true };

    /// <summary>Notes a group that another process has put into the container.</summary>
    internal Errno Adopt(VfioGroup group)
    {
        Errno errno = ReadInfo();
        if (errno != Errno.None) return errno;
        _groups.Add(group);
        group.Container = this;
        return Errno.None;
    }

    /// <summary>Withdraws the virtual addresses behind all mappings; DMA goes on. Called by each device, done once.</summary>
    /// <exception cref="VfioException">The kernel refused.</exception>
    internal void SuspendAddresses()
    {
        if (_suspended) return;
        Errno errno = Invalidate();
        if (errno != Errno.None) throw new VfioException($"{Name}: cannot suspend the addresses of guest memory: {Posix.Describe(errno)}", errno);
        _suspended = true;
    }

    /// <summary>
    /// Tells the kernel where guest memory is in this process. The new process calls it when it has loaded; the old one when it goes on after a
    /// failure, at whatever point the new one failed. Called by each device, done once.
    /// </summary>
    /// <exception cref="VfioException">The kernel refused. In the old process, the addresses that were set before have been withdrawn again.</exception>
    internal void TakeAddresses()
    {
        if (!_suspended) return;
        var taken = new List<Mapping>();
        foreach (Mapping mapping in Placed)
        {
            Errno errno = Update(mapping);
            // The new process has set this address, perhaps between the two calls, and was killed or is about to end.
            for (int i = 0; errno == Errno.EINVAL && !_arriving && i < MaxTakes && Invalidate(mapping.Range) == Errno.None; i++) errno = Update(mapping);
            if (errno == Errno.None)
            {
                taken.Add(mapping);
                continue;
            }
            // The new process withdraws nothing: the old one may have set the address meanwhile.
            foreach (Mapping one in _arriving ? [] : taken)
                if (Invalidate(one.Range) is not Errno.None and var undone) VfioKernelLog.CleanupFailed(Logger, Name, $"suspending the address of {one.Range} again", undone);
            throw new VfioException($"{Name}: cannot move the mapping of {mapping.Range} (RAM block '{mapping.Block.Name}') to this process: {Posix.Describe(errno)}", errno)
            {
                Hint = "both processes need the same memory layout",
            };
        }
        _suspended = false;
    }

    /// <summary>The container belongs to this process now, which maps and unmaps RAM as usual.</summary>
    internal void Arrived() => _arriving = LeavesMappingsAlone = false;

    /// <summary>The container belongs to another process now; closing it here leaves it as it is.</summary>
    internal void HandOver() => LeavesMappingsAlone = true;

    /// <summary>Withdraws the address of one mapping, or of all. The kernel withdraws all or none, and none when one has no address already.</summary>
    private Errno Invalidate(GuestRange? range = null)
    {
        var unmap = new VfioUapi.IommuType1DmaUnmap
        {
            Argsz = (uint)Marshal.SizeOf<VfioUapi.IommuType1DmaUnmap>(), Flags = VfioUapi.VFIO_DMA_UNMAP_FLAG_VADDR | (range is null ? VfioUapi.VFIO_DMA_UNMAP_FLAG_ALL : 0),
            Iova = range?.Start.Value ?? 0, Size = range?.LengthBytes ?? 0,
        };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_UNMAP_DMA, ref unmap);
    }

    private Errno Update(Mapping mapping)
    {
        var map = new VfioUapi.IommuType1DmaMap
        {
            Argsz = (uint)Marshal.SizeOf<VfioUapi.IommuType1DmaMap>(), Flags = VfioUapi.VFIO_DMA_MAP_FLAG_VADDR,
            Vaddr = (ulong)mapping.Block.HostAddress + mapping.OffsetBytes, Iova = mapping.Range.Start.Value, Size = mapping.Range.LengthBytes,
        };
        return _kernel.Call(_fd, VfioUapi.VFIO_IOMMU_MAP_DMA, ref map);
    }
}
