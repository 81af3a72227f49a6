using Vmm.Core.Pci;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Device;

// CONFIG record = PCIDevice, then with MSI-X: byte[16 n]:table, byte[ceil(n / 8)]:pending bits (spec vfio-migration 6)
internal sealed partial class VfioPciFunction : IVfioConfigState
{
    private static readonly VmStateDescription<VfioPciFunction> s_state = new()
    {
        Name = "VFIOPCIDevice",
        Fields =
        [
            VmState.Struct<VfioPciFunction, PciDevice>("pdev", PciDevice.PciState, static f => f),
            VmState.Struct<VfioPciFunction, PciDevice>("pdev", PciDevice.MsixState, static f => f, exists: static (f, _) => f.Msix is not null),
        ],
    };

    /// <inheritdoc/>
    public void ReadShadow()
    {
        if (ReadDeviceConfig() is not { } device) return;
        // Checked bits stay as they were when the device was opened, or a destination that was just opened would refuse them; the header
        // stays as the guest wrote it.
        for (int i = PciRegisters.HeaderBytes; i < device.Length; i++)
        {
            int fresh = ~_emulated[i] & ~Config.CheckedBits(i) & 0xff;
            Config.Bytes[i] = (byte)((Config.Bytes[i] & ~fresh) | (device[i] & fresh));
        }
    }

    /// <inheritdoc/>
    public void SaveConfig(QemuFileWriter f) => s_state.Bind(this).Save(f, null);

    /// <inheritdoc/>
    public void LoadConfig(QemuFileReader f, bool apply)
    {
        if (!apply)
        {
            CheckState(f, s_state.Name);
            return;
        }
        Irqs.DisableAll();
        s_state.Bind(this).Load(f, s_state.VersionId);
        ForwardCommand(Config.Command);
        FollowBusMaster();
        Irqs.EnableByConfig();
        Irqs.UpdateMessages();
        MapDirect();
    }

    /// <inheritdoc/>
    public void ReapplyAfterReset()
    {
        ForwardCommand(Config.Command);
        if (Msi is { IsEnabled: true }) Forward(Msi.Offset + 2, 2, Msi.Control);
        if (Msix is { IsEnabled: true }) Forward(Msix.Offset + 2, 2, Msix.Control);
        Irqs.Rebind();
    }
}
