using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;

namespace Vmm.Samples.DevicePlugin;

/// <summary>
/// A PCI function with 1 MiB of memory of its own, the store. It does in small what a passed-through device does: its memory moves while the guest
/// runs (<see cref="StoreSection"/>), it writes guest RAM behind the VMM's back and logs that itself (<see cref="StoreDirtyLog"/>), it rests while the
/// VM is stopped, and it can forbid to be moved.
/// <code>
/// BAR 0: 0x00 u32 page of the store   0x08 u64 guest address   0x10 u32 wo doorbell: copy the page to the address
/// BAR 1: the page, 4096 bytes
/// </code>
/// </summary>
public sealed class StoreDevice : PciDevice, IVmDevice, IVmStateHandler
{
    public const int PageBytes = RamBlock.PageSize, Pages = 256;

    private readonly List<IDisposable> _registrations = [];
    private readonly IDeviceServices _services;
    private readonly StoreDirtyLog _dirtyLog = new();
    private readonly OwnedFd _doorbell = Posix.EventFd();
    private readonly Lock _copying = new();
    private IDisposable? _blocker;
    private bool _runs; // Under _copying.
    private uint _page; // This and the address are the guest's to see; BQL.
    private ulong _address;

    public StoreDevice(DeviceOptions options, IDeviceServices services)
        : base(services.Pci, new PciDeviceOptions { Id = options.Id })
    {
        _services = services;
        Config.SetUInt16(PciRegisters.VendorId, 0x1af4);
        Config.SetUInt16(PciRegisters.DeviceId, 0x10f0);
        RegisterBar(0, PciBarType.Memory32, PageBytes);
        RegisterBar(1, PciBarType.Memory32, PageBytes);
        _registrations.Add(services.RegisterVmState(Description, this, path: Path));
        _registrations.Add(services.SaveVm.Register(new SaveVmRegistration { IdStr = $"{Path}/store-pages" }, SaveVmHandlers.Of(new StoreSection(this))));
        _registrations.Add(services.RunState.Register(this));
        _registrations.Add(services.Memory.AddDirtyLogSource(_dirtyLog));
        _registrations.Add(services.EventFds.Add(_doorbell, OnDoorbell));
    }

    public static VmStateDescription<StoreDevice> Description { get; } = new()
    {
        Name = "store",
        Fields =
        [
            VmState.Struct<StoreDevice, PciDevice>("parent_obj", PciState, static d => d),
            VmState.UInt32<StoreDevice>("page", static d => ref d._page),
            VmState.UInt64<StoreDevice>("address", static d => ref d._address),
        ],
    };

    internal byte[] Memory { get; } = new byte[Pages * PageBytes];

    /// <summary>Pages of the store that were written since the saving attempt looked last; null while there is no attempt.</summary>
    internal DirtyBitmap? Changed { get; set; }

    /// <summary>Forbids to move the device, as hardware does that is bound to its host. The reason is shown to the user.</summary>
    public void Pin()
    {
        using (_services.Bql.Acquire()) _blocker ??= _services.Blockers.Add($"device '{Id}' is pinned", MigrationModes.Normal);
    }

    public void Unpin()
    {
        using (_services.Bql.Acquire())
        {
            _blocker?.Dispose();
            _blocker = null;
        }
    }

    /// <summary>Told with the BQL held. Guest memory must not change any more once this has returned for a stop.</summary>
    public void OnVmStateChange(bool running, RunState state)
    {
        lock (_copying) _runs = running;
        // What was asked for before the stop is done when the VM runs again, here or elsewhere.
        if (running) Posix.SignalEventFd(_doorbell);
    }

    public override void Reset()
    {
        base.Reset();
        (_page, _address) = (0, 0);
    }

    protected override ulong BarRead(int bar, ulong offset, int size) => (bar, offset) switch
    {
        (1, _) => Get(Memory.AsSpan((int)_page * PageBytes + (int)offset, size)),
        (0, 0x00) => _page,
        (0, 0x08) => _address,
        _ => PciHost.AllOnes(size),
    };

    protected override void BarWrite(int bar, ulong offset, int size, ulong value)
    {
        switch (bar, offset)
        {
            case (1, _):
                for (int i = 0; i < size; i++) Memory[(int)_page * PageBytes + (int)offset + i] = (byte)(value >> (8 * i));
                Changed?.Set(_page);
                break;
            case (0, 0x00): _page = (uint)value % Pages; break;
            case (0, 0x08): _address = value; break;
            case (0, 0x10): Posix.SignalEventFd(_doorbell); break;
        }
    }

    protected override void Dispose(bool disposing)
    {
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        Unpin();
        base.Dispose(disposing);
        _doorbell.Dispose();
    }

    /// <summary>On the VM's thread for eventfds, without the BQL.</summary>
    private void OnDoorbell()
    {
        Posix.DrainEventFd(_doorbell);
        (uint page, GuestAddress address) = (Volatile.Read(ref _page), new GuestAddress(Volatile.Read(ref _address)));
        lock (_copying)
        {
            if (!_runs || _services.Memory.FindBlock(address) is not { } block) return;
            ulong offset = address.Value - block.Address.Value;
            if (offset > block.SizeBytes - PageBytes) return;
            Memory.AsSpan((int)page * PageBytes, PageBytes).CopyTo(block.Slice(offset, PageBytes));
            _dirtyLog.Note(address, PageBytes);
        }
    }

    private static ulong Get(ReadOnlySpan<byte> bytes)
    {
        ulong value = 0;
        for (int i = bytes.Length - 1; i >= 0; i--) value = value << 8 | bytes[i];
        return value;
    }
}
