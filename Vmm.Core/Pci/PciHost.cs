using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;

namespace Vmm.Core.Pci;

/// <summary>
/// The PCI bus of a VM: 32 slots on a conventional bus 0, configuration mechanism #1, decoding of BARs, and the four interrupt lines that functions
/// share. One per VM; a bus without functions saves nothing. Any thread may make a guest access, with or without the BQL, because the access takes
/// the BQL where it needs it. Plugging needs the BQL (QEMU: <c>PCIHostState</c>, <c>PCIBus</c>).
/// </summary>
/// <param name="bql">Lock of the VM.</param>
/// <param name="saveVm">Registry; the bus registers its sections when the first function is plugged.</param>
/// <param name="interrupts">Receives the interrupts of all functions.</param>
/// <param name="dma">Memory that functions reach by DMA; null for none.</param>
public sealed partial class PciHost(Bql bql, SaveVmRegistry saveVm, IInterruptController interrupts, IPciDma? dma = null)
{
    /// <summary>Number of slots.</summary>
    public const int Slots = 32;

    /// <summary>Number of interrupt lines that the pins of the functions share.</summary>
    public const int IntxLines = 4;

    /// <summary>Port of the address register of mechanism #1.</summary>
    public const ushort ConfigAddressPort = 0xcf8;

    /// <summary>First of the four ports of the data register of mechanism #1.</summary>
    public const ushort ConfigDataPort = 0xcfc;

    private const uint ConfigEnable = 0x8000_0000;
    private const int FunctionsPerSlot = 8;

    private readonly PciDevice?[] _functions = new PciDevice?[Slots * FunctionsPerSlot];
    private int[] _irqCount = new int[IntxLines];
    private readonly List<IDisposable> _sections = [];
    private uint _configReg;
    private int _nirq = IntxLines;

    /// <summary>State of the host bridge (QEMU: <c>vmstate_pcihost</c>).</summary>
    public static VmStateDescription<PciHost> HostState { get; } = new()
    {
        Name = "PCIHost",
        Fields = [VmState.UInt32<PciHost>("config_reg", static h => ref h._configReg)],
    };

    /// <summary>State of the bus: how many functions assert each line (QEMU: <c>vmstate_pcibus</c>).</summary>
    public static VmStateDescription<PciHost> BusState { get; } = new()
    {
        Name = "PCIBUS",
        Fields =
        [
            VmState.Int32Equal<PciHost>("nirq", static h => ref h._nirq),
            VmState.VarArray<PciHost, int>("irq_count", VmStateTypes.Int32, static h => h._nirq, static h => h._irqCount),
        ],
        PostLoad = static (h, _) => h.OnBusLoaded(),
    };

    /// <summary>The functions, ordered by slot and function. BQL: held.</summary>
    public IEnumerable<PciDevice> Functions => _functions.OfType<PciDevice>();

    /// <summary>
    /// Number of lines that the bus's section counts. A machine with a line for each function has more than <see cref="IntxLines"/>, such as QEMU's
    /// x-remote with 256; the additional lines stay idle. Set it before the first function is plugged.
    /// </summary>
    internal int SavedLines
    {
        get => _nirq;
        set
        {
            ArgumentOutOfRangeException.ThrowIfLessThan(value, IntxLines);
            if (_sections.Count > 0) throw new InvalidOperationException("the bus has functions");
            (_nirq, _irqCount) = (value, new int[value]);
        }
    }

    internal Bql Bql => bql;

    /// <summary>
    /// The memory that functions reach by DMA; with null every DMA fails. Set before the VM first runs, and cleared when that memory goes away.
    /// </summary>
    public IPciDma? Dma { get; set; } = dma;

    internal IInterruptController Interrupts => interrupts;

    /// <summary>Finds a function by slot and function. BQL: held.</summary>
    /// <returns>The function, or null.</returns>
    public PciDevice? Find(PciAddress address) => _functions[address.DevFn];

    /// <summary>
    /// Returns the line of a pin (QEMU: <c>pci_swizzle</c>). Pin A of each slot has another line, so that functions with one pin spread over all lines.
    /// </summary>
    /// <param name="slot">0 to 31.</param>
    /// <param name="pin">0 to 3 for A to D.</param>
    /// <returns>0 to 3.</returns>
    public static int Swizzle(int slot, int pin) => (slot + pin) % IntxLines;

    internal PciAddress Attach(PciDevice device, PciAddress? wanted)
    {
        bql.AssertHeld();
        PciAddress address = wanted ?? NextFree();
        if (Find(address) is { } holder)
            throw new ConfigurationException($"device '{device.Id}': PCI address {address.Slot:x2}.{address.Function} is in use by '{holder.Id}'");
        CheckMultiFunction(device, address);
        if (_sections.Count == 0)
        {
            _sections.Add(saveVm.RegisterVmState(HostState, this));
            _sections.Add(saveVm.RegisterVmState(BusState, this));
        }
        _functions[address.DevFn] = device;
        return address;
    }

    internal void Detach(PciDevice device)
    {
        bql.AssertHeld();
        _functions[device.Address.DevFn] = null;
        RebuildMappings();
        if (Functions.Any()) return;
        for (int i = _sections.Count - 1; i >= 0; i--) _sections[i].Dispose();
        _sections.Clear();
    }

    internal void ChangeIrqLevel(int slot, int pin, int change)
    {
        int line = Swizzle(slot, pin);
        bool was = _irqCount[line] > 0;
        _irqCount[line] += change;
        Debug.Assert(_irqCount[line] >= 0, "a line is deasserted more often than asserted");
        if (_irqCount[line] > 0 != was) interrupts.SetIntx(line, !was);
    }

    private PciAddress NextFree()
    {
        // Slot 0 is for a host bridge, which some machines have.
        for (int slot = 1; slot < Slots; slot++)
            if (!Enumerable.Range(0, FunctionsPerSlot).Any(f => Find(new PciAddress(slot, f)) is not null)) return new PciAddress(slot, 0);
        throw new ConfigurationException($"all {Slots - 1} PCI slots are in use");
    }

    /// <summary>A guest looks for further functions of a slot only if function 0 says that there are any (QEMU: <c>pci_init_multifunction</c>).</summary>
    private void CheckMultiFunction(PciDevice device, PciAddress address)
    {
        PciDevice? first = Find(address with { Function = 0 });
        bool hidden = address.Function != 0
            ? first is { IsMultiFunction: false }
            : !device.IsMultiFunction && Enumerable.Range(1, FunctionsPerSlot - 1).Any(f => Find(address with { Function = f }) is not null);
        if (hidden) throw new ConfigurationException($"device '{device.Id}': PCI slot {address.Slot:x2} has a single function; function 0 needs multifunction=on");
    }

    private void OnBusLoaded()
    {
        foreach (int count in _irqCount)
            if (count < 0 || count > _functions.Length) throw new DeviceStateException($"PCIBUS: irq_count {count} is outside 0 to {_functions.Length}");
        for (int line = 0; line < IntxLines; line++) interrupts.SetIntx(line, _irqCount[line] > 0);
    }
}
