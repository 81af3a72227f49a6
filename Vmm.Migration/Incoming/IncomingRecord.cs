using Vmm.Migration.Status;

namespace Vmm.Migration.Incoming;

/// <summary>How one incoming migration ended. Written before the status changes, read by any thread.</summary>
internal sealed class IncomingRecord
{
    private volatile MigrationError? _error;
    private volatile DowntimeReport? _downtime;

    /// <summary>Why it failed, or null.</summary>
    internal MigrationError? Error
    {
        get => _error;
        set => _error = value;
    }

    /// <summary>This side's part of the downtime, or null.</summary>
    internal DowntimeReport? Downtime
    {
        get => _downtime;
        set => _downtime = value;
    }
}
