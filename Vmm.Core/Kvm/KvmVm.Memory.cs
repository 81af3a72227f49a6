using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

// Memory slots. A slot keeps its number until it is removed; then another slot may get the number.
internal sealed partial class KvmVm : IGuestMemoryListener
{
    // A change replaces the array, because a vCPU with a full dirty ring looks slots up without the BQL.
    private volatile Slot[] _slots = [];
    private bool _logging;

    /// <summary>Present slots. BQL: held.</summary>
    internal IReadOnlyList<Slot> Slots => _slots;

    /// <inheritdoc/>
    public void SectionAdded(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        AddSlot(section.Range, section.Block.HostAddress + (nint)section.OffsetBytes, section.IsReadOnly, isRam: true);
    }

    /// <inheritdoc/>
    public void SectionRemoved(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        RemoveSlot(section.Range);
    }

    /// <summary>Called after a slot is removed from the guest and before its number is free, to read its last entries from the dirty rings.</summary>
    internal Action<Slot>? SlotRemoved { get; set; }

    /// <summary>Finds a slot by its number. Any thread.</summary>
    internal Slot? FindSlot(uint number) => Array.Find(_slots, s => s.Number == number);

    /// <summary>Maps host memory into the guest. BQL: held.</summary>
    /// <param name="range">Guest-physical range, page-aligned.</param>
    /// <param name="hostAddress">Address in this process; the memory must stay mapped until the slot is removed.</param>
    /// <param name="isReadOnly">True if writes must exit to this process.</param>
    /// <param name="isRam">True if writes are logged for migration.</param>
    /// <exception cref="KvmException">The kernel refused, e.g. an overlap.</exception>
    internal void AddSlot(GuestRange range, nint hostAddress, bool isReadOnly, bool isRam)
    {
        uint number = 0;
        while (Array.Exists(_slots, s => s.Number == number)) number++;
        var slot = new Slot(number, range, hostAddress, isReadOnly, isRam);
        Update(slot, _logging);
        _slots = [.. _slots, slot];
    }

    /// <summary>Removes the slot of a range; on return the guest cannot reach the memory any more. BQL: held.</summary>
    /// <param name="range">The range given to <see cref="AddSlot"/>.</param>
    internal void RemoveSlot(GuestRange range)
    {
        Slot? slot = Array.Find(_slots, s => s.Range == range);
        if (slot is null) return;
        // The dirty log since the last harvest is lost with the slot; the memory goes too, so nobody needs it.
        Update(slot, log: false, sizeBytes: 0);
        SlotRemoved?.Invoke(slot);
        _slots = [.. _slots.Where(s => s != slot)];
    }

    /// <summary>Switches write logging of all RAM slots on or off. BQL: held.</summary>
    internal void SetLogging(bool on)
    {
        foreach (Slot slot in _slots) Update(slot, on);
        _logging = on;
    }

    private void Update(Slot slot, bool log, ulong? sizeBytes = null)
    {
        var region = new UserspaceMemoryRegion
        {
            Slot = slot.Number,
            Flags = (log && slot.IsRam ? KVM_MEM_LOG_DIRTY_PAGES : 0) | (slot.IsReadOnly ? KVM_MEM_READONLY : 0),
            GuestPhysAddr = slot.Range.Start.Value,
            MemorySize = sizeBytes ?? slot.Range.LengthBytes,
            UserspaceAddr = (ulong)slot.HostAddress,
        };
        Set(KVM_SET_USER_MEMORY_REGION, Ioctl.AsBytes(ref region), $"memory slot {slot.Number} at {slot.Range}");
    }

    /// <summary>A memory slot of KVM.</summary>
    internal sealed record Slot(uint Number, GuestRange Range, nint HostAddress, bool IsReadOnly, bool IsRam);
}
