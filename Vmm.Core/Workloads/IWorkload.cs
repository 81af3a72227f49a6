using Vmm.Core.Devices;

namespace Vmm.Core.Workloads;

/// <summary>A page with other content than the workload wrote.</summary>
/// <param name="Block">Name of the RAM block.</param>
/// <param name="Page">Index of the page in the block.</param>
/// <param name="Expected">The content that the page should have, in words.</param>
/// <param name="Found">The content that it has, in words.</param>
public sealed record WorkloadViolation(string Block, long Page, string Expected, string Found)
{
    /// <summary>Names block, page, expected and found in one line.</summary>
    public override string ToString() => $"RAM block '{Block}' page {Page}: expected {Expected}, found {Found}";
}

/// <summary>Result of a scan.</summary>
/// <param name="PagesChecked">Number of pages checked, index pages included; 0 if the workload never ran on this RAM.</param>
/// <param name="BadPages">Number of wrong pages.</param>
/// <param name="FirstBad">The first wrong page, or null.</param>
public sealed record WorkloadReport(long PagesChecked, long BadPages, WorkloadViolation? FirstBad);

/// <summary>A device that dirties RAM by itself and can check that RAM holds what it wrote. Find it in <see cref="Vm.Devices"/>.</summary>
public interface IWorkload
{
    /// <summary>The device's id.</summary>
    string Id { get; }

    /// <summary>Pages written since the RAM was new, on all hosts that the VM ran on. Any thread; never waits for the workload.</summary>
    long Writes { get; }

    /// <summary>Wrong pages that this process found while writing. Any thread; never waits for the workload.</summary>
    long Violations { get; }

    /// <summary>The first of the <see cref="Violations"/>, or null. Any thread; never waits for the workload.</summary>
    WorkloadViolation? FirstViolation { get; }

    /// <summary>
    /// Checks every page. Any thread, with or without the BQL; pauses a running workload for a few milliseconds at a time. The result has a meaning only
    /// while no incoming migration writes RAM.
    /// </summary>
    /// <exception cref="OperationCanceledException">Cancelled.</exception>
    WorkloadReport Verify(CancellationToken cancel = default);
}
