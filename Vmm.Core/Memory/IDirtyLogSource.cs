namespace Vmm.Core.Memory;

/// <summary>
/// Knows which guest pages were written: the VMM itself, KVM, an IOMMU or another process. A page is dirty if at least one source has marked it
/// (QEMU: memory listeners' <c>log_start</c>, <c>log_sync</c>, <c>log_stop</c>). <see cref="GuestMemory"/> makes one call at a time.
/// </summary>
public interface IDirtyLogSource
{
    /// <summary>Name in logs and errors.</summary>
    string Name { get; }

    /// <summary>Starts logging. BQL: held.</summary>
    /// <param name="ranges">All guest RAM.</param>
    /// <param name="pageSizeHint">Preferred granularity, bytes.</param>
    /// <returns>The granularity that the source uses, bytes; a multiple of 4096.</returns>
    /// <exception cref="Errors.VmmException">The source cannot log; the migration or measurement fails.</exception>
    uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint);

    /// <summary>Moves the marks of one range into a bitmap and clears them at the source. BQL: held.</summary>
    /// <param name="range">A range that <see cref="Start"/> got.</param>
    /// <param name="into">One bit for each 4096 bytes of the range.</param>
    /// <exception cref="Errors.VmmException">Marks may be lost; the migration fails.</exception>
    void Harvest(GuestRange range, DirtyBitmap into);

    /// <summary>Stops logging; also called after <see cref="Start"/> failed, must not throw. BQL: held.</summary>
    void Stop();
}
