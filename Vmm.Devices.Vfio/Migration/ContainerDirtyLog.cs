using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>What logs the DMA writes to one container's RAM.</summary>
internal enum DirtyTrackingMethod
{
    /// <summary>Every device logs its own writes.</summary>
    Devices,
    /// <summary>The IOMMU logs them.</summary>
    Container,
    /// <summary>Nothing does: all pages always count as dirty.</summary>
    Nobody,
}

/// <summary>
/// The dirty pages of all devices of one container (vfio-migration 3.10): the devices' own logs if every device has one, else the
/// container's, else all pages. A log that fails while it runs is lost; from then on all pages count as written. BQL: held.
/// </summary>
/// <param name="container">The container.</param>
/// <param name="devices">Its migratable devices now.</param>
/// <param name="logger">Log.</param>
internal sealed class ContainerDirtyLog(IVfioContainer container, Func<IReadOnlyList<VfioMigration>> devices, ILogger logger) : IDirtyLogSource
{
    private const ulong PageSize = RamBlock.PageSize;
    private const ulong FourGiB = 1UL << 32;

    private readonly List<(VfioMigration Device, ulong PageSizeBytes)> _started = [];
    private ulong[] _words = [];
    private bool _isContainerStarted;

    public string Name => container.Name;

    /// <summary>The method in force while the log runs.</summary>
    internal DirtyTrackingMethod Method { get; private set; }

    /// <summary>A log failed, so that all pages count as written until the next start.</summary>
    internal bool IsLost { get; private set; }

    public uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint)
    {
        // A device that is gone writes no memory and logs none.
        IReadOnlyList<VfioMigration> all = [.. devices().Where(static d => d.Io.LostReason is null)];
        bool isNobodyThere = all.Count == 0 && devices().Count > 0;
        IsLost = false;
        Method = isNobodyThere || (all.Count > 0 && all.All(static d => d.CanLogDma)) ? DirtyTrackingMethod.Devices
            : container.CanLogDirty ? DirtyTrackingMethod.Container : DirtyTrackingMethod.Nobody;
        ulong granularity = PageSize;
        switch (Method)
        {
            case DirtyTrackingMethod.Devices:
                List<GuestRange> joined = all.Count > 0 ? Join(ranges) : [];
                foreach (VfioMigration device in all)
                {
                    Errno errno = device.Io.StartDmaLog(pageSizeHint, joined, out ulong inForce);
                    if (errno == Errno.None && (inForce < PageSize || !ulong.IsPow2(inForce))) errno = Errno.EINVAL;
                    if (errno != Errno.None)
                    {
                        Stop();
                        throw new VfioException($"device '{device.Io.Name}' cannot log its DMA writes ({errno})", errno);
                    }
                    _started.Add((device, inForce));
                    granularity = Math.Max(granularity, inForce);
                }
                break;
            case DirtyTrackingMethod.Container:
                Errno refused = container.StartDirtyLog();
                if (refused != Errno.None) throw new VfioException($"container '{container.Name}' cannot log DMA writes ({refused})", refused);
                _isContainerStarted = true;
                break;
        }
        ulong longest = ranges.Count == 0 ? 0 : ranges.Max(static r => r.LengthBytes);
        _words = new ulong[(longest + (64 * PageSize) - 1) / (64 * PageSize)];
        return (uint)Math.Min(granularity, uint.MaxValue);
    }

    public void Harvest(GuestRange range, DirtyBitmap into)
    {
        if (IsTooEarly()) return;
        if (Method == DirtyTrackingMethod.Nobody || IsLost)
        {
            into.SetAll();
            return;
        }
        if (Method == DirtyTrackingMethod.Container)
        {
            Take(range, PageSize, into, container.Name, words => container.GetDirtyBitmap(range, words));
            return;
        }
        foreach ((VfioMigration device, ulong pageSize) in _started)
            Take(range, pageSize, into, device.Io.Name, words => device.Io.ReportDmaLog(range, pageSize, words));
    }

    public void Stop()
    {
        foreach ((VfioMigration device, _) in _started) Warn(device.Io.Name, device.Io.StopDmaLog());
        _started.Clear();
        if (_isContainerStarted) Warn(container.Name, container.StopDirtyLog());
        _isContainerStarted = false;
        _words = [];
    }

    /// <summary>
    /// With <c>x-pre-copy-dirty-page-tracking=off</c> the log is not read while VM and device run, and without a log nothing counts as written until then:
    /// a migration would never come to its end if all RAM were sent in each pass. The last harvest, of a stopped VM, is never put off.
    /// </summary>
    private bool IsTooEarly() => devices().Any(static d => !d.Options.PreCopyDirtyPageTracking && d.Services.RunState.IsRunning
        && d.Protocol!.State is VfioDeviceState.Running or VfioDeviceState.RunningP2P or VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P);

    private delegate Errno Query(Span<ulong> words);

    private void Take(GuestRange range, ulong pageSize, DirtyBitmap into, string name, Query query)
    {
        ulong pages = (range.LengthBytes + pageSize - 1) / pageSize;
        Span<ulong> words = _words.AsSpan(0, (int)((pages + 63) / 64));
        words.Clear();
        Errno errno = query(words);
        if (errno != Errno.None)
        {
            VfioMigrationLog.DirtyLogLost(logger, name, errno.ToString());
            IsLost = true;
            into.SetAll();
            return;
        }
        if (pageSize == PageSize)
        {
            for (int i = 0; i < words.Length; i++) into.OrWord(i, words[i]);
            return;
        }
        long factor = (long)(pageSize / PageSize);
        for (ulong page = 0; page < pages; page++)
        {
            if ((words[(int)(page >> 6)] >> (int)(page & 63) & 1) == 0) continue;
            long first = (long)page * factor;
            into.SetRange(first, Math.Min(factor, into.PageCount - first));
        }
    }

    private void Warn(string name, Errno errno)
    {
        if (errno != Errno.None) VfioMigrationLog.DirtyLogStopFailed(logger, name, errno.ToString());
    }

    /// <summary>At most one range below 4 GiB and one above: a device may take only a few (vfio-migration 3.10).</summary>
    private static List<GuestRange> Join(IReadOnlyList<GuestRange> ranges)
    {
        var joined = new List<GuestRange>();
        foreach (IGrouping<bool, GuestRange> side in ranges.GroupBy(static r => r.Start.Value < FourGiB).OrderByDescending(static g => g.Key))
        {
            ulong start = side.Min(static r => r.Start.Value), end = side.Max(static r => r.End);
            joined.Add(new GuestRange(new GuestAddress(start), end - start));
        }
        return joined;
    }
}
