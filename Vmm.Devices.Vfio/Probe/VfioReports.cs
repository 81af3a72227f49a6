using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Probe;

/// <summary>What a host offers to VFIO.</summary>
/// <param name="HasContainerNode"><c>/dev/vfio/vfio</c> exists.</param>
/// <param name="HasIommufdNode"><c>/dev/iommu</c> exists.</param>
/// <param name="Devices">Devices in IOMMU groups, by group number; none when the IOMMU is off.</param>
public sealed record VfioHostReport(bool HasContainerNode, bool HasIommufdNode, IReadOnlyList<VfioMemberReport> Devices);

/// <summary>One device of an IOMMU group.</summary>
/// <param name="Group">Number of the group.</param>
/// <param name="HasGroupNode"><c>/dev/vfio/N</c> exists for the group.</param>
/// <param name="Name">PCI address or UUID.</param>
/// <param name="Driver">Its driver, or null.</param>
/// <param name="IsVfio">A VFIO driver has it.</param>
/// <param name="CharacterDevice">Name of its character device, or null.</param>
public sealed record VfioMemberReport(string Group, bool HasGroupNode, string Name, string? Driver, bool IsVfio, string? CharacterDevice);

/// <summary>What one device can do. The device was opened to find out.</summary>
public sealed record VfioDeviceReport
{
    /// <summary>PCI address or UUID.</summary>
    public required string Name { get; init; }

    /// <summary>Container in which the device was opened: type1 or iommufd.</summary>
    public required string Container { get; init; }

    /// <summary>A PCI function.</summary>
    public required bool IsPci { get; init; }

    /// <summary>The driver announces a reset; some devices reset without announcing it.</summary>
    public required bool SupportsReset { get; init; }

    /// <summary>Regions that the device has.</summary>
    public required IReadOnlyList<VfioRegionInfo> Regions { get; init; }

    /// <summary>Interrupts that the device has, with their index.</summary>
    public required IReadOnlyList<(uint Index, uint Count, VfioIrqInfoFlags Flags)> Irqs { get; init; }

    /// <summary>Migration protocol: 2, 1, or 0 for none.</summary>
    public int Protocol { get; init; }

    /// <summary>Protocol 2's flags.</summary>
    public VfioMigrationFlags Migration { get; init; }

    /// <summary>Protocol 2's states that this device has, by the names of QEMU's VFIO_MIGRATION event.</summary>
    public IReadOnlyList<string> States { get; init; } = [];

    /// <summary>Migration state in which the device was found; it has been reset when that was not <c>running</c>.</summary>
    public string? FoundIn { get; init; }

    /// <summary>Size of the device's state in bytes at that moment; null when the device does not say.</summary>
    public ulong? StateBytes { get; init; }

    /// <summary>The device logs its own DMA writes.</summary>
    public bool CanLogDma { get; init; }

    /// <summary>The IOMMU, or its driver, logs the device's DMA writes.</summary>
    public bool ContainerCanLogDirty { get; init; }

    /// <summary>Why a VM with this device could not migrate; empty when it could.</summary>
    public IReadOnlyList<string> Blockers { get; init; } = [];
}
