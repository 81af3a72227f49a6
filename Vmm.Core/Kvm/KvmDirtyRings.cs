using Microsoft.Extensions.Logging;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// Pages that the guest wrote, from the ring of each vCPU. KVM protects a page again before the harvest reports it, so a later write is in the next
/// harvest. If the kernel runs a vCPU past the end of its full ring, it overwrites entries that nobody took; then all pages count as dirty, and the
/// ring is synchronised again. Start, harvest and stop need the BQL; a vCPU with a full ring calls without it.
/// </summary>
internal sealed class KvmDirtyRings : IDirtyLogSource
{
    internal const int EntryBytes = 16;

    /// <summary>Smallest ring. The kernel reserves 64 or more entries for pages that a vCPU writes while it leaves the guest.</summary>
    internal const int MinEntries = 1024;

    private readonly Lock _gate = new();
    private readonly KvmVm _vm;
    private readonly ILogger _logger;
    private readonly KvmDirtyRing[] _rings;
    private readonly Dictionary<uint, DirtyBitmap> _marks = []; // By slot number.
    private bool _on;

    internal KvmDirtyRings(KvmVm vm, IReadOnlyList<KvmVcpu> vcpus, ILogger logger)
    {
        (_vm, _logger) = (vm, logger);
        _rings = [.. vcpus.Select(v => new KvmDirtyRing(v.Ring!, vm.DirtyRingEntries))];
        vm.SlotRemoved = OnSlotRemoved;
    }

    /// <summary>How often the kernel overran a full ring.</summary>
    internal int Overruns { get; private set; }

    /// <summary>Number of entries taken so far.</summary>
    internal long Entries { get; private set; }

    /// <inheritdoc/>
    public string Name => "kvm-ring";

    /// <inheritdoc/>
    public uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint)
    {
        lock (_gate)
        {
            _marks.Clear();
            _on = true;
        }
        _vm.SetLogging(true);
        return RamBlock.PageSize;
    }

    /// <inheritdoc/>
    public void Harvest(GuestRange range, DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(into);
        KvmVm.Slot? slot = _vm.Slots.FirstOrDefault(s => s.IsRam && s.Range == range);
        if (slot is null) return;
        lock (_gate)
        {
            Drain();
            if (_marks.TryGetValue(slot.Number, out DirtyBitmap? marks)) marks.HarvestInto(into);
        }
    }

    /// <inheritdoc/>
    public void Stop()
    {
        _vm.SetLogging(false);
        lock (_gate)
        {
            Drain();
            _on = false;
            _marks.Clear();
        }
    }

    /// <summary>Empties all rings; a vCPU calls it when its ring is full. BQL: not held.</summary>
    internal void OnRingFull()
    {
        lock (_gate) Drain();
    }

    /// <summary>Drains the entries of a removed slot, because a later slot may get its number and must not inherit them.</summary>
    private void OnSlotRemoved(KvmVm.Slot slot)
    {
        lock (_gate)
        {
            Drain();
            _marks.Remove(slot.Number);
        }
    }

    private void Drain()
    {
        foreach (KvmDirtyRing ring in _rings)
        {
            while (true)
            {
                int taken = ring.Take(Mark);
                if (taken == 0) break;
                Entries += taken;
                // One reset for each ring, so that the returned count is of this ring.
                int reset = Ioctl.Invoke(_vm.Fd, KVM_RESET_DIRTY_RINGS, 0, out Errno errno);
                if (reset < 0) throw KvmSystem.Failed("KVM_RESET_DIRTY_RINGS", errno);
                if (ring.Reset(taken, reset)) break;
                OnOverrun();
            }
        }
    }

    private void OnOverrun()
    {
        if (Overruns++ == 0) CoreLog.DirtyRingOverrun(_logger, _vm.DirtyRingEntries);
        if (!_on) return;
        foreach (KvmVm.Slot slot in _vm.Slots)
            if (slot.IsRam) Marks(slot).SetAll();
    }

    private void Mark(uint number, ulong page)
    {
        if (!_on || _vm.FindSlot(number) is not { IsRam: true } slot) return;
        DirtyBitmap marks = Marks(slot);
        if (page < (ulong)marks.PageCount) marks.Set((long)page);
    }

    private DirtyBitmap Marks(KvmVm.Slot slot)
    {
        if (!_marks.TryGetValue(slot.Number, out DirtyBitmap? marks))
            _marks.Add(slot.Number, marks = new DirtyBitmap((long)(slot.Range.LengthBytes / RamBlock.PageSize)));
        return marks;
    }
}
