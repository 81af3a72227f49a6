namespace Vmm.Core.Memory;

/// <summary>One stretch of guest-physical addresses backed by RAM (QEMU: <c>MemoryRegionSection</c>).</summary>
/// <param name="Range">Where the guest sees it.</param>
/// <param name="Block">What backs it.</param>
/// <param name="OffsetBytes">Offset of the first byte in the block.</param>
/// <param name="IsReadOnly">The guest and devices may only read it.</param>
public sealed record GuestMemorySection(GuestRange Range, RamBlock Block, ulong OffsetBytes, bool IsReadOnly = false);

/// <summary>Follows the guest-physical address map (QEMU: <c>MemoryListener</c>). BQL: held.</summary>
public interface IGuestMemoryListener
{
    /// <summary>RAM appeared. A listener that throws keeps it from appearing.</summary>
    /// <param name="section">The stretch.</param>
    void SectionAdded(GuestMemorySection section);

    /// <summary>RAM is about to go; on return nothing may use it any more.</summary>
    /// <param name="section">A stretch that was added.</param>
    void SectionRemoved(GuestMemorySection section);
}
