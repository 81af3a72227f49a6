namespace Vmm.Migration.Ram;

/// <summary>
/// Finds the places in the main channel where the channels of multifd must have come to a SYNC. From QEMU 8.0 on that is MULTIFD_FLUSH. Before, and
/// with <c>multifd-flush-after-each-section</c>, it is the end of each section, and no MULTIFD_FLUSH is sent. The setup section, which every source
/// syncs at, tells which form it is.
/// </summary>
/// <param name="wait">Waits until all channels have come to their next SYNC.</param>
internal sealed class SyncMarks(Action wait)
{
    private bool _flushed;
    private bool? _eachSection;

    /// <summary>The source marks with MULTIFD_FLUSH.</summary>
    internal bool UsesFlush => _flushed;

    /// <summary>A record MULTIFD_FLUSH.</summary>
    internal void OnFlush()
    {
        _flushed = true;
        wait();
    }

    /// <summary>A record EOS: the end of a section's body.</summary>
    internal void OnEndOfSection()
    {
        _eachSection ??= !_flushed;
        if (_eachSection == true) wait();
    }
}
