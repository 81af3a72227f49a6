using Vmm.Core.VmStates;
using Vmm.Core.Wire;

namespace Vmm.Core.Pci;

// body = be32:version 2, byte[256 or 4096]:config, be32[4]:level of each pin (vfio-migration 6.1)
public abstract partial class PciDevice
{
    private static readonly VmStateType<PciConfigSpace> s_config = ConfigType(PciConfigSpace.LegacyBytes);
    private static readonly VmStateType<PciConfigSpace> s_expressConfig = ConfigType(PciConfigSpace.ExpressBytes);

    private static readonly VmStateType<uint> s_irqState = new("pci irq state", 4 * Pins, static (f, v) =>
    {
        for (int pin = 0; pin < Pins; pin++) f.WriteUInt32(v >> pin & 1);
    }, static (l, ref v) => v = ReadLevels(l));

    private static readonly VmStateType<MsixTable> s_msix = new("msix state", 0, static (f, v) =>
    {
        f.Write(v.TableBytes);
        f.Write(v.PbaBytes);
    }, static (l, ref v) =>
    {
        byte[] table = new byte[v.TableBytes.Length], pba = new byte[v.PbaBytes.Length];
        l.File.Read(table);
        l.File.Read(pba);
        v.Load(table, pba);
    });

    private int _versionId = 2;

    /// <summary>
    /// The part of a function's state that the core keeps (QEMU: <c>vmstate_pci_device</c>). A load compares the bits that must agree before it changes
    /// anything.
    /// </summary>
    public static VmStateDescription<PciDevice> PciState { get; } = new()
    {
        Name = "PCIDevice", VersionId = 2, MinimumVersionId = 1,
        Fields =
        [
            VmState.Int32LessEqual<PciDevice>("version_id", static d => ref d._versionId),
            VmState.Single<PciDevice, PciConfigSpace>("config", s_config, static d => ref d._config, exists: static (d, _) => !d._config.IsExpress),
            VmState.Single<PciDevice, PciConfigSpace>("config", s_expressConfig, static d => ref d._config, exists: static (d, _) => d._config.IsExpress),
            VmState.Single<PciDevice, uint>("irq_state", s_irqState, static d => ref d._irqState, since: 2),
        ],
        PostLoad = static (d, _) =>
        {
            // The levels of the lines are in the bus's own section.
            d.UpdateIrqStatus();
            d.UpdateMappings();
            d.OnConfigLoaded();
        },
    };

    /// <summary>
    /// A function's MSI-X table and pending bits, which follow <see cref="PciState"/> in functions with MSI-X (QEMU: <c>vmstate_msix</c>).
    /// </summary>
    public static VmStateDescription<PciDevice> MsixState { get; } = new()
    {
        Name = "msix", VersionId = 0, MinimumVersionId = 0,
        Fields = [VmState.Single<PciDevice, MsixTable>("msix", s_msix, static d => ref d._msix!)],
    };

    /// <summary>
    /// Reads and checks the content of a section with <see cref="PciState"/> and, for functions with MSI-X, <see cref="MsixState"/>; changes nothing.
    /// </summary>
    /// <param name="f">The stream, at the first byte of the content.</param>
    /// <param name="name">Name of the section's description, for error messages.</param>
    /// <exception cref="Errors.StreamFormatException">A value that no function can have.</exception>
    /// <exception cref="Errors.IncompatibleStateException">A function with other registers.</exception>
    /// <exception cref="Errors.StreamTruncatedException">The stream ended.</exception>
    public void CheckState(QemuFileReader f, string name)
    {
        ArgumentNullException.ThrowIfNull(f);
        var loader = new VmStateLoader(f);
        loader.Path.EnterField(name);
        long at = f.Position;
        int version = f.ReadInt32();
        if (version is < 0 or > 2) throw loader.Bad(at, "0 to 2", $"{version}");
        ReadConfig(loader, _config);
        ReadLevels(loader);
        if (_msix is not null) f.Skip(_msix.TableBytes.Length + _msix.PbaBytes.Length);
    }

    private static VmStateType<PciConfigSpace> ConfigType(int sizeBytes) =>
        new("pci config", sizeBytes, static (f, v) => f.Write(v.Bytes), static (l, ref v) => ReadConfig(l, v).CopyTo(v.Bytes));

    private static byte[] ReadConfig(VmStateLoader l, PciConfigSpace local)
    {
        long at = l.File.Position;
        byte[] incoming = new byte[local.SizeBytes];
        l.File.Read(incoming);
        int bad = local.FindMismatch(incoming);
        if (bad < 0) return incoming;
        byte mask = local.CheckedBits(bad);
        throw l.Incompatible(at + bad, $"config space offset 0x{bad:x2} differs in bits 0x{mask:x2}", $"0x{local.Bytes[bad] & mask:x2}", $"0x{incoming[bad] & mask:x2}");
    }

    private static uint ReadLevels(VmStateLoader l)
    {
        uint state = 0;
        for (int pin = 0; pin < Pins; pin++)
        {
            long at = l.File.Position;
            uint level = l.File.ReadUInt32();
            if (level > 1) throw l.Bad(at, "a level of 0 or 1", $"{level}");
            state |= level << pin;
        }
        return state;
    }
}
