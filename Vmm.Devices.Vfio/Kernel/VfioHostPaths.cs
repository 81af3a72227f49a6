namespace Vmm.Devices.Vfio.Kernel;

/// <summary>Paths under which the host shows its devices; tests use a tree of their own.</summary>
internal sealed record VfioHostPaths
{
    /// <summary>sysfs.</summary>
    public string Sysfs { get; init; } = "/sys";

    /// <summary>Device nodes.</summary>
    public string Dev { get; init; } = "/dev";

    /// <summary>The container's node.</summary>
    public string Container => Path.Combine(Dev, "vfio", "vfio");

    /// <summary>iommufd's node.</summary>
    public string Iommufd => Path.Combine(Dev, "iommu");

    /// <summary>Folder of all PCI functions.</summary>
    public string PciDevices => Path.Combine(Sysfs, "bus", "pci", "devices");

    /// <summary>Folder of all mediated devices.</summary>
    public string MediatedDevices => Path.Combine(Sysfs, "bus", "mdev", "devices");

    /// <summary>Folder of all IOMMU groups.</summary>
    public string Groups => Path.Combine(Sysfs, "kernel", "iommu_groups");

    /// <summary>A group's node.</summary>
    public string Group(string number) => Path.Combine(Dev, "vfio", number);

    /// <summary>A device's node.</summary>
    public string Cdev(string name) => Path.Combine(Dev, "vfio", "devices", name);
}
