using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// Pages that the guest wrote: from the kernel's bitmap of each slot, cleared by hand where the kernel can, or from the vCPUs' rings. A page is
/// protected again before its mark is handed out, so a write after the harvest is in the next one.
/// </summary>
internal sealed class KvmDirtyLog(KvmVm vm, IReadOnlyList<KvmVcpu> vcpus) : IDirtyLogSource
{
    private const int EntryBytes = 16;

    private readonly Lock _gate = new();
    private readonly Dictionary<uint, DirtyBitmap> _fromRings = [];
    private readonly int[] _next = new int[vcpus.Count];
    // By slot, and the slots as the rings name them; both change with the BQL and the gate held.
    private bool _on;

    /// <inheritdoc/>
    public string Name => "kvm";

    /// <inheritdoc/>
    public uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint)
    {
        lock (_gate)
        {
            _fromRings.Clear();
            _on = true;
        }
        vm.SetLogging(true);
        return RamBlock.PageSize;
    }

    /// <inheritdoc/>
    public void Harvest(GuestRange range, DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(into);
        KvmVm.Slot? slot = vm.Slots.FirstOrDefault(s => s.IsRam && s.Range == range);
        if (slot is null) return;
        if (vm.DirtyRingEntries > 0)
        {
            lock (_gate)
            {
                DrainRings();
                if (_fromRings.TryGetValue(slot.Number, out DirtyBitmap? marks) && marks.PageCount == into.PageCount) marks.HarvestInto(into);
            }
            return;
        }
        HarvestBitmap(slot, into);
    }

    /// <inheritdoc/>
    public void Stop()
    {
        vm.SetLogging(false);
        lock (_gate)
        {
            DrainRings();
            _on = false;
            _fromRings.Clear();
        }
    }

    /// <summary>Empties all rings; called by a vCPU whose own is full. BQL: not held.</summary>
    internal void OnRingFull()
    {
        lock (_gate) DrainRings();
    }

    private void HarvestBitmap(KvmVm.Slot slot, DirtyBitmap into)
    {
        long pages = into.PageCount;
        ulong[] words = new ulong[(pages + 63) / 64];
        var get = new DirtyLog { Slot = slot.Number };
        if (Ioctl.Invoke(vm.Fd, KVM_GET_DIRTY_LOG, Ioctl.AsBytes(ref get), 8, Ioctl.AsBytes<ulong>(words), out Errno errno) < 0)
            throw KvmSystem.Failed($"KVM_GET_DIRTY_LOG of slot {slot.Number} at {slot.Range}", errno);
        if (vm.HasManualClear && words.AsSpan().ContainsAnyExcept(0UL))
        {
            var clear = new ClearDirtyLog { Slot = slot.Number, NumPages = (uint)pages };
            if (Ioctl.Invoke(vm.Fd, KVM_CLEAR_DIRTY_LOG, Ioctl.AsBytes(ref clear), 16, Ioctl.AsBytes<ulong>(words), out errno) < 0)
                throw KvmSystem.Failed($"KVM_CLEAR_DIRTY_LOG of slot {slot.Number} at {slot.Range}", errno);
        }
        for (int i = 0; i < words.Length; i++) into.OrWord(i, words[i]);
    }

    private void DrainRings()
    {
        bool any = false;
        for (int i = 0; i < vcpus.Count; i++)
        {
            MappedRegion? ring = vcpus[i].Ring;
            if (ring is null) continue;
            while (true)
            {
                ulong at = (ulong)(_next[i] % vm.DirtyRingEntries) * EntryBytes;
                // The kernel publishes the flags last, and takes the entry back by them.
                ring.TryReadIo(at, 4, out ulong flags);
                if ((flags & KVM_DIRTY_GFN_F_DIRTY) == 0) break;
                ring.TryReadIo(at + 4, 4, out ulong slot);
                ring.TryReadIo(at + 8, 8, out ulong page);
                if (_on) Mark((uint)slot, (long)page);
                ring.TryWriteIo(at, 4, KVM_DIRTY_GFN_F_RESET);
                _next[i]++;
                any = true;
            }
        }
        if (any && Ioctl.Invoke(vm.Fd, KVM_RESET_DIRTY_RINGS, 0, out Errno errno) < 0) throw KvmSystem.Failed("KVM_RESET_DIRTY_RINGS", errno);
    }

    private void Mark(uint slot, long page)
    {
        if (!_fromRings.TryGetValue(slot, out DirtyBitmap? marks))
        {
            KvmVm.Slot? known = vm.FindSlot(slot);
            if (known is null) return;
            _fromRings.Add(slot, marks = new DirtyBitmap((long)(known.Range.LengthBytes / RamBlock.PageSize)));
        }
        if (page < marks.PageCount) marks.Set(page);
    }
}
