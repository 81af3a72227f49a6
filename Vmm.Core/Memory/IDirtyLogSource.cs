namespace Vmm.Core.Memory;

/// <summary>
/// Somebody who knows which guest pages were written: the VMM itself, KVM, the IOMMU, another process. Sources add up: a page is
/// dirty when any source says so (QEMU: memory listeners' <c>log_start</c>, <c>log_sync</c>, <c>log_stop</c>).
/// </summary>
public interface IDirtyLogSource
{
    /// <summary>For logs and errors.</summary>
    string Name { get; }

    /// <summary>Starts logging. BQL: held.</summary>
    /// <param name="ranges">All of guest RAM.</param>
    /// <param name="pageSizeHint">Preferred granularity in bytes.</param>
    /// <returns>The granularity in force, bytes; a multiple of 4096 or 4096 itself.</returns>
    uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint);

    /// <summary>Moves the marks of one range into a bitmap and clears them at the source. BQL: held.</summary>
    /// <param name="range">A range given to <see cref="Start"/>.</param>
    /// <param name="into">One bit per 4096 bytes of the range.</param>
    void Harvest(GuestRange range, DirtyBitmap into);

    /// <summary>Stops logging; also called after a failed <see cref="Start"/>. BQL: held.</summary>
    void Stop();
}
