using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>
/// One DMA address space with the devices in it: a type1 container, an iommufd address space, or the one device of a vfio-user connection.
/// It follows the guest's RAM and maps all of it at its guest-physical addresses. BQL: held for every call.
/// </summary>
internal interface IVfioContainer : IGuestMemoryListener
{
    /// <summary>For logs and errors.</summary>
    string Name { get; }

    /// <summary>Whether it can log DMA writes by itself (type1 MIGRATION capability, iommufd dirty tracking).</summary>
    bool CanLogDirty { get; }

    /// <summary>Longest bitmap of one query, bytes; 0 without a log.</summary>
    ulong MaxDirtyBitmapBytes { get; }

    /// <summary>Starts the log. Idempotent.</summary>
    /// <returns>The kernel's answer.</returns>
    Errno StartDirtyLog();

    /// <summary>Stops the log. Idempotent.</summary>
    /// <returns>The kernel's answer.</returns>
    Errno StopDirtyLog();

    /// <summary>Reads and clears the log of one mapped range, page size 4096.</summary>
    /// <param name="range">DMA addresses; as mapped.</param>
    /// <param name="bitmap">One bit a page, 64 a word, LSB first; set bits are added to what is there.</param>
    /// <returns>The kernel's answer.</returns>
    Errno GetDirtyBitmap(GuestRange range, Span<ulong> bitmap);
}
