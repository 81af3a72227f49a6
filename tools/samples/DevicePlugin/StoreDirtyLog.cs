using Vmm.Core.Memory;

namespace Vmm.Samples.DevicePlugin;

/// <summary>
/// Which pages of guest RAM the device wrote by itself: to the VMM these writes are invisible. The VMM starts, harvests and stops with the BQL
/// held; <see cref="Note"/> comes from the device's own thread.
/// </summary>
internal sealed class StoreDirtyLog : IDirtyLogSource
{
    private volatile (GuestRange Range, DirtyBitmap Pages)[] _ranges = [];

    public string Name => "store";

    public uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint)
    {
        _ranges = [.. ranges.Select(static r => (r, new DirtyBitmap((long)(r.LengthBytes / RamBlock.PageSize))))];
        return RamBlock.PageSize;
    }

    public void Harvest(GuestRange range, DirtyBitmap into)
    {
        foreach ((GuestRange logged, DirtyBitmap pages) in _ranges)
            if (logged == range) pages.HarvestInto(into);
    }

    public void Stop() => _ranges = [];

    /// <summary>Marks what was just written. After the write: a harvest between the two would otherwise lose it.</summary>
    internal void Note(GuestAddress address, int lengthBytes)
    {
        foreach ((GuestRange range, DirtyBitmap pages) in _ranges)
        {
            if (!range.Contains(address)) continue;
            long first = (long)((address.Value - range.Start.Value) / RamBlock.PageSize);
            long last = (long)((address.Value - range.Start.Value + (ulong)lengthBytes - 1) / RamBlock.PageSize);
            pages.SetRange(first, last - first + 1);
        }
    }
}
