using Vmm.Core.Pci;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Devices.Vfio.Device;

// CONFIG record = PCIDevice, then with MSI-X: byte[16 n]:table, byte[ceil(n / 8)]:pending bits (vfio-migration 6)
internal sealed partial class VfioPciFunction : IVfioConfigState
{
    /// <summary>QEMU: <c>PCI_INTX_DISABLED</c>, always written: a load sets up irqfds anew and needs no route.</summary>
    private const uint RouteDisabled = 2;

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
    public void TakeSignals() => Irqs.TakeSignals();

    /// <inheritdoc/>
    public void ReadShadow()
    {
        if (ReadDeviceConfig() is not { } device) return;
        // Bits that a load compares keep their values from the opening of the device, because a fresh destination compares with the same; the
        // header stays as the guest wrote it.
        for (int i = PciRegisters.HeaderBytes; i < device.Length; i++)
        {
            int fresh = ~_emulated[i] & ~Config.CheckedBits(i) & 0xff;
            Config.Bytes[i] = (byte)((Config.Bytes[i] & ~fresh) | (device[i] & fresh));
        }
    }

    /// <inheritdoc/>
    public void SaveConfig(QemuFileWriter f) => s_state.Bind(this).Save(f);

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

    /// <summary>
    /// State for the next process: as <see cref="SaveConfig"/>, then <c>vfio-cpr-intx</c> inline: u8 pending, u32 route mode, u32 line (vfio-migration 7.6).
    /// </summary>
    internal void SaveCpr(QemuFileWriter f)
    {
        SaveConfig(f);
        f.WriteBool(Irqs.IsIntxPending);
        f.WriteUInt32(RouteDisabled);
        f.WriteUInt32(0);
    }

    /// <summary>Reads what <see cref="SaveCpr"/> wrote; the io keeps all requests from the device meanwhile.</summary>
    internal void LoadCpr(QemuFileReader f)
    {
        // Not compared: the same device runs on, so bytes that are not emulated may have changed since the save (QEMU: vfio_cpr_pci_pre_load).
        byte[] agreed = Config.CMask.ToArray();
        for (int i = 0; i < agreed.Length; i++) Config.CMask[i] &= _emulated[i];
        try
        {
            LoadConfig(f, apply: true);
        }
        finally
        {
            agreed.CopyTo(Config.CMask);
        }
        Irqs.LoadIntxPending(f.ReadBool());
        f.ReadUInt32();
        f.ReadUInt32();
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
