namespace Vmm.Core.Memory;

/// <summary>A range of guest-physical addresses that RAM backs (QEMU: <c>MemoryRegionSection</c>).</summary>
/// <param name="Range">Guest-physical range.</param>
/// <param name="Block">The block that backs it.</param>
/// <param name="OffsetBytes">Offset of the range's first byte in the block.</param>
/// <param name="IsReadOnly">True if guest and devices may only read it.</param>
public sealed record GuestMemorySection(GuestRange Range, RamBlock Block, ulong OffsetBytes, bool IsReadOnly = false);

/// <summary>Hears of changes of the guest-physical address map (QEMU: <c>MemoryListener</c>). BQL: held.</summary>
public interface IGuestMemoryListener
{
    /// <summary>RAM is being added; if the listener throws, it is not added.</summary>
    /// <exception cref="Errors.VmmException">The listener cannot take it, e.g. the kernel refused to map it.</exception>
    void SectionAdded(GuestMemorySection section);

    /// <summary>RAM is about to be removed; when this returns, nothing may use it any more.</summary>
    void SectionRemoved(GuestMemorySection section);
}
