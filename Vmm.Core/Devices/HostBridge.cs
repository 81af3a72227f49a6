using Vmm.Core.Pci;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The function at 00:00.0, from which a guest's kernel learns that a PCI bus exists: QEMU's generic host bridge with its section (QEMU:
/// <c>gpex-root</c>). It has no registers of its own. BQL: held for every call.
/// </summary>
internal sealed class HostBridge : PciDevice
{
    /// <summary>QEMU's <c>vmstate_gpex_root</c>.</summary>
    public static VmStateDescription<HostBridge> Description { get; } = new()
    {
        Name = "gpex_root",
        Fields = [VmState.Struct<HostBridge, PciDevice>("parent_obj", PciState, static d => d)],
    };

    private readonly IDisposable _section;

    /// <summary>Plugs the bridge and registers its section.</summary>
    /// <exception cref="Errors.ConfigurationException">Slot 0 is in use.</exception>
    public HostBridge(IDeviceServices services)
        : base((services ?? throw new ArgumentNullException(nameof(services))).Pci, new PciDeviceOptions { Id = "host-bridge", Address = "0" })
    {
        Config.SetUInt16(PciRegisters.VendorId, 0x1b36);
        Config.SetUInt16(PciRegisters.DeviceId, 0x0008);
        Config.SetUInt16(PciRegisters.SubsystemVendorId, 0x1af4);
        Config.SetUInt16(PciRegisters.SubsystemId, 0x1100);
        Config.SetUInt16(PciRegisters.ClassDevice, 0x0600);
        _section = services.RegisterVmState(Description, this, path: Path);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        _section.Dispose();
        base.Dispose(disposing);
    }
}
