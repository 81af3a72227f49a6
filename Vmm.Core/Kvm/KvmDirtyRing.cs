using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// One vCPU's ring of <c>struct kvm_dirty_gfn</c>. The kernel flags an entry dirty, we flag it for reset, and KVM_RESET_DIRTY_RINGS clears it; both
/// go round in order. Not thread-safe but against the kernel.
/// </summary>
/// <param name="memory">The ring.</param>
/// <param name="entries">Its length, a power of two.</param>
internal sealed class KvmDirtyRing(MappedRegion memory, int entries)
{
    private const ulong SlotOffset = 4, PageOffset = 8;
    private ulong _next; // Where the kernel resets next; counts on for ever.
    private bool _isAstray; // The kernel went past us: its next entry is somewhere ahead.

    /// <summary>Takes what is there, at most one round.</summary>
    /// <param name="mark">Told slot and page within it.</param>
    /// <returns>Entries that now wait for the reset.</returns>
    internal int Take(Action<uint, ulong> mark)
    {
        int taken = 0;
        for (; taken < entries; taken++)
        {
            ulong at = At(taken);
            // The kernel publishes the flags last.
            if (!IsDirty(at) && !FindAhead(ref taken)) break;
            at = At(taken);
            memory.TryReadIo(at + SlotOffset, 4, out ulong slot);
            memory.TryReadIo(at + PageOffset, 8, out ulong page);
            mark((uint)slot, page);
            memory.TryWriteIo(at, 4, KVM_DIRTY_GFN_F_RESET);
        }
        return taken;
    }

    /// <summary>Follows the kernel after its reset.</summary>
    /// <param name="taken">What <see cref="Take"/> returned.</param>
    /// <param name="reset">What the kernel reset.</param>
    /// <returns>False when entries were overwritten, or may have been, before they were taken.</returns>
    internal bool Reset(int taken, int reset)
    {
        _next += (ulong)reset;
        // An entry is overwritten only after all of the ring was dirty at once, and then a whole round was taken.
        if (taken < entries && taken == reset) return true;
        _isAstray = true;
        return false;
    }

    /// <summary>After an overrun the kernel's entries begin behind a gap; the gap's count as taken, for it resets in order.</summary>
    private bool FindAhead(ref int taken)
    {
        if (!_isAstray) return false;
        // A second look: who finds an entry sees all that were written before it, also those that came while the first look went past them.
        int found, before;
        for (found = Scan(taken), before = -1; found != before; (before, found) = (found, Scan(taken)))
            if (found == entries) return false;
        for (; taken < found; taken++) memory.TryWriteIo(At(taken), 4, KVM_DIRTY_GFN_F_RESET);
        _isAstray = false;
        return true;
    }

    private int Scan(int from)
    {
        while (from < entries && !IsDirty(At(from))) from++;
        return from;
    }

    private ulong At(int ahead) => (_next + (ulong)ahead) % (ulong)entries * KvmDirtyRings.EntryBytes;

    private bool IsDirty(ulong at) => memory.TryReadIo(at, 4, out ulong flags) && (flags & KVM_DIRTY_GFN_F_DIRTY) != 0;
}
