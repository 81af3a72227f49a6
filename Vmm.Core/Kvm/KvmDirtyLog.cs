using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// Pages that the guest wrote, from the kernel's bitmap of each slot, with manual clear where the kernel has it. KVM protects a page again before
/// the harvest reports it, so a later write is in the next harvest. BQL: held for every call.
/// </summary>
internal sealed class KvmDirtyLog(KvmVm vm) : IDirtyLogSource
{
    /// <inheritdoc/>
    public string Name => "kvm";

    /// <inheritdoc/>
    public uint Start(IReadOnlyList<GuestRange> ranges, uint pageSizeHint)
    {
        vm.SetLogging(true);
        return RamBlock.PageSize;
    }

    /// <inheritdoc/>
    public void Harvest(GuestRange range, DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(into);
        KvmVm.Slot? slot = vm.Slots.FirstOrDefault(s => s.IsRam && s.Range == range);
        if (slot is null) return;
        HarvestBitmap(slot, into);
    }

    /// <inheritdoc/>
    public void Stop() => vm.SetLogging(false);

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
}
