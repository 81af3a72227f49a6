using Vmm.Core.Devices;

namespace Vmm.Core.Workloads;

/// <summary>A page whose content is not what the workload put there.</summary>
/// <param name="Block">RAM block.</param>
/// <param name="Page">Page index in the block.</param>
/// <param name="Expected">What should be there.</param>
/// <param name="Found">What is there.</param>
public sealed record WorkloadViolation(string Block, long Page, string Expected, string Found)
{
    /// <summary>One line that names block, page, expected and found.</summary>
    /// <returns>The text.</returns>
    public override string ToString() => $"RAM block '{Block}' page {Page}: expected {Expected}, found {Found}";
}

/// <summary>Outcome of a scan.</summary>
/// <param name="PagesChecked">Pages looked at, index pages included; 0 when the workload never ran on this RAM.</param>
/// <param name="BadPages">Pages that are wrong.</param>
/// <param name="FirstBad">The first of them, or null.</param>
public sealed record WorkloadReport(long PagesChecked, long BadPages, WorkloadViolation? FirstBad);

/// <summary>What a workload did so far.</summary>
/// <param name="Writes">Pages written since the RAM was new, on all machines that ran it.</param>
/// <param name="Violations">Wrong pages met while writing, by this process.</param>
/// <param name="FirstViolation">The first of them, or null.</param>
public sealed record WorkloadCounters(long Writes, long Violations, WorkloadViolation? FirstViolation);

/// <summary>A device that dirties RAM by itself and can tell whether RAM holds what it wrote. Found among <see cref="Vm.Devices"/>.</summary>
public interface IWorkload
{
    /// <summary>The device's id.</summary>
    string Id { get; }

    /// <summary>Counters; any thread, never blocks on the workload.</summary>
    WorkloadCounters Counters { get; }

    /// <summary>
    /// Checks every page. Any thread, with or without the BQL; a running workload is paused for a few milliseconds at a time. The answer is
    /// only meaningful while no incoming migration writes RAM.
    /// </summary>
    /// <param name="cancel">Ends the scan early.</param>
    /// <returns>The report.</returns>
    /// <exception cref="OperationCanceledException">Cancelled.</exception>
    WorkloadReport Verify(CancellationToken cancel = default);
}
