using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// A container that changes process: its mappings stay, the addresses behind them are taken back by the old process and given anew by the next
/// (vfio-migration 7.5, 7.6; QEMU: <c>vfio_cpr_unmap_vaddr_all</c>, <c>vfio_legacy_cpr_dma_map</c>). BQL: held for every call.
/// </summary>
internal sealed partial class Type1Container
{
    /// <summary>How often the old process takes one mapping back. The new one takes each once, so that two are enough.</summary>
    private const int MaxTakes = 3;

    private bool _suspended;
    private bool _arriving;

    /// <summary>Why the container cannot change process, or null.</summary>
    internal string? CprBlockedReason =>
        !HasExtension(VfioUapi.VFIO_UPDATE_VADDR) ? "the kernel's container does not support VFIO_UPDATE_VADDR"
        : !HasExtension(VfioUapi.VFIO_UNMAP_ALL) ? "the kernel's container does not support VFIO_UNMAP_ALL"
        : null;

    /// <summary>Takes over a container that another process has set up. RAM is noted, not mapped, until <see cref="TakeAddresses"/>.</summary>
    /// <param name="fd">Its descriptor; owned.</param>
    /// <param name="kernel">System calls.</param>
    /// <param name="logger">Logger.</param>
    internal static Type1Container Inherit(OwnedFd fd, IVfioKernel kernel, ILogger logger) =>
        new(fd, kernel, "type1 container", logger) { _arriving = true, _suspended = true, LeavesMappingsAlone = true };

    /// <summary>Notes a group that is in already.</summary>
    internal Errno Adopt(VfioGroup group)
    {
        Errno errno = ReadInfo();
        if (errno != Errno.None) return errno;
        _groups.Add(group);
        group.Container = this;
        return Errno.None;
    }

    /// <summary>Takes the addresses behind all mappings back; DMA goes on. Once for all devices.</summary>
    /// <exception cref="VfioException">The kernel refused.</exception>
    internal void SuspendAddresses()
    {
        if (_suspended) return;
        Errno errno = Invalidate();
        if (errno != Errno.None) throw new VfioException($"{Name}: cannot suspend the addresses of guest memory: {Posix.Describe(errno)}", errno);
        _suspended = true;
    }

    /// <summary>
    /// Tells the kernel where guest memory is in this process: the new one when it has loaded, or the old one that goes on, however far the new one
    /// came before it failed. Once for all devices.
    /// </summary>
    /// <exception cref="VfioException">The kernel refused. What the old process told before is taken back.</exception>
    internal void TakeAddresses()
    {
        if (!_suspended) return;
        var taken = new List<Mapping>();
        foreach (Mapping mapping in Placed)
        {
            Errno errno = Update(mapping);
            // The new process had taken it, or takes it between the two, and was killed or is about to end.
            for (int i = 0; errno == Errno.EINVAL && !_arriving && i < MaxTakes && Invalidate(mapping.Range) == Errno.None; i++) errno = Update(mapping);
            if (errno == Errno.None)
            {
                taken.Add(mapping);
                continue;
            }
            // The new process gives nothing back: the old one may have taken it meanwhile.
            foreach (Mapping one in _arriving ? [] : taken)
                if (Invalidate(one.Range) is not Errno.None and var undone) VfioKernelLog.CleanupFailed(Logger, Name, $"suspending the address of {one.Range} again", undone);
            throw new VfioException($"{Name}: cannot move the mapping of {mapping.Range} (RAM block '{mapping.Block.Name}') to this process: {Posix.Describe(errno)}", errno)
            {
                Hint = "both processes need the same memory layout",
            };
        }
        _suspended = false;
    }

    /// <summary>The container is this process's: RAM is mapped and unmapped as ever.</summary>
    internal void Arrived() => _arriving = LeavesMappingsAlone = false;

    /// <summary>The container is another process's: closing it here leaves it as it is.</summary>
    internal void HandOver() => LeavesMappingsAlone = true;

    /// <summary>Takes the addresses of one mapping back, or of all: of all or none, and of none when one has none already.</summary>
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
