namespace Vmm.Migration.Ram;

/// <summary>
/// Finds the marks in the main channel at which the channels of multifd must have come to a SYNC. From QEMU 8.0 on the mark is a record MULTIFD_FLUSH. Before,
/// and with <c>multifd-flush-after-each-section</c>, the mark is the end of each section, and no MULTIFD_FLUSH is sent. Every source syncs in the setup
/// section, which therefore shows which form it uses.
/// </summary>
/// <param name="wait">Waits until all channels have come to their next SYNC.</param>
internal sealed class SyncMarks(Action wait)
{
    private bool _flushed;
    private bool? _eachSection;

    /// <summary>True when the source marks SYNCs with MULTIFD_FLUSH.</summary>
    internal bool UsesFlush => _flushed;

    /// <summary>Called for a record MULTIFD_FLUSH.</summary>
    internal void OnFlush()
    {
        _flushed = true;
        wait();
    }

    /// <summary>Called for a record EOS, which ends a section's body.</summary>
    internal void OnEndOfSection()
    {
        _eachSection ??= !_flushed;
        if (_eachSection == true) wait();
    }
}
