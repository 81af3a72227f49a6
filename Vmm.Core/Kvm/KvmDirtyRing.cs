using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// One vCPU's ring of <c>struct kvm_dirty_gfn</c>. The kernel sets an entry's dirty flag, this class sets its reset flag, and KVM_RESET_DIRTY_RINGS
/// clears it; kernel and class both walk the ring in order. One thread at a time, besides the kernel.
/// </summary>
/// <param name="memory">Mapping of the ring.</param>
/// <param name="entries">Length of the ring, a power of two.</param>
internal sealed class KvmDirtyRing(MappedRegion memory, int entries)
{
    private const ulong SlotOffset = 4, PageOffset = 8;
    private ulong _next; // Number of entries that the kernel has reset so far; modulo the length, the next entry that it resets.
    private bool _isAstray; // The kernel overran the ring; its next entry is at an unknown place ahead.

    /// <summary>Takes the dirty entries, at most the length of the ring.</summary>
    /// <param name="mark">Gets the slot number and the page in the slot of each entry.</param>
    /// <returns>Number of entries that now wait for the reset.</returns>
    internal int Take(Action<uint, ulong> mark)
    {
        int taken = 0;
        for (; taken < entries; taken++)
        {
            ulong at = At(taken);
            // The kernel writes the flags of an entry last, so the other fields are valid.
            if (!IsDirty(at) && !FindAhead(ref taken)) break;
            at = At(taken);
            memory.TryReadIo(at + SlotOffset, 4, out ulong slot);
            memory.TryReadIo(at + PageOffset, 8, out ulong page);
            mark((uint)slot, page);
            memory.TryWriteIo(at, 4, KVM_DIRTY_GFN_F_RESET);
        }
        return taken;
    }

    /// <summary>Notes how many entries the kernel has reset.</summary>
    /// <param name="taken">Result of <see cref="Take"/>.</param>
    /// <param name="reset">Result of KVM_RESET_DIRTY_RINGS.</param>
    /// <returns>False if the kernel overwrote entries before they were taken, or may have.</returns>
    internal bool Reset(int taken, int reset)
    {
        _next += (ulong)reset;
        // The kernel overwrites an entry only if the whole ring is dirty, and then Take has returned the length of the ring.
        if (taken < entries && taken == reset) return true;
        _isAstray = true;
        return false;
    }

    /// <summary>
    /// After an overrun, clean entries lie before the kernel's next dirty one. Flags those for reset too, because the kernel resets entries in order.
    /// </summary>
    private bool FindAhead(ref int taken)
    {
        if (!_isAstray) return false;
        // Scan until two results agree: the first scan may pass an entry just before the kernel writes it, and find only a later one.
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
