using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

// Memory slots. A slot's number stays with its range until it is removed; numbers are used again.
internal sealed partial class KvmVm : IGuestMemoryListener
{
    // Replaced as a whole: a vCPU with a full dirty ring looks slots up without the BQL.
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

    /// <summary>Called when a slot is gone for the guest and its number is not yet free: the last moment for what the kernel noted of it.</summary>
    internal Action<Slot>? SlotRemoved { get; set; }

    /// <summary>A slot by its number. Any thread.</summary>
    internal Slot? FindSlot(uint number) => Array.Find(_slots, s => s.Number == number);

    /// <summary>Shows host memory to the guest. BQL: held.</summary>
    /// <param name="range">Where; page aligned.</param>
    /// <param name="hostAddress">What; must stay mapped until the slot is removed.</param>
    /// <param name="isReadOnly">Writes exit instead.</param>
    /// <param name="isRam">Whether writes are logged for migration.</param>
    /// <exception cref="KvmException">The kernel refused, e.g. an overlap.</exception>
    internal void AddSlot(GuestRange range, nint hostAddress, bool isReadOnly, bool isRam)
    {
        uint number = 0;
        while (Array.Exists(_slots, s => s.Number == number)) number++;
        var slot = new Slot(number, range, hostAddress, isReadOnly, isRam);
        Update(slot, _logging);
        _slots = [.. _slots, slot];
    }

    /// <summary>Takes a slot away; the guest no longer reaches the memory on return. BQL: held.</summary>
    /// <param name="range">As it was added.</param>
    internal void RemoveSlot(GuestRange range)
    {
        Slot? slot = Array.Find(_slots, s => s.Range == range);
        if (slot is null) return;
        // What the guest wrote since the last harvest is lost with the slot, and so is the memory.
        Update(slot, log: false, sizeBytes: 0);
        SlotRemoved?.Invoke(slot);
        _slots = [.. _slots.Where(s => s != slot)];
    }

    /// <summary>Switches write logging of all RAM slots. BQL: held.</summary>
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

    /// <summary>One slot.</summary>
    internal sealed record Slot(uint Number, GuestRange Range, nint HostAddress, bool IsReadOnly, bool IsRam);
}
