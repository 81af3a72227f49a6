using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>The host's device that an option names, and how to open it.</summary>
/// <param name="SysfsPath">Its folder in sysfs.</param>
/// <param name="UseIommufd">True: character device and iommufd; false: group and container; null: the former if the device has a character device.</param>
internal sealed record VfioDeviceChoice(string SysfsPath, bool? UseIommufd)
{
    /// <summary>Reads <c>host=</c> or <c>sysfsdev=</c>, and <c>iommufd=on|off|auto</c>.</summary>
    /// <returns>The choice.</returns>
    /// <exception cref="ConfigurationException">None or both of the two, or a value that is no address.</exception>
    internal static VfioDeviceChoice From(DeviceOptions options, VfioHostPaths paths)
    {
        string what = $"device '{options.TypeName}'";
        string host = options.GetString("host", string.Empty), sysfs = options.GetString("sysfsdev", string.Empty), iommufd = options.GetString("iommufd", "auto");
        if (host.Length > 0 == sysfs.Length > 0)
            throw new ConfigurationException($"{what}: give one of host= and sysfsdev=") { Hint = "host=0000:01:00.0, or sysfsdev=/sys/bus/mdev/devices/UUID" };
        if (sysfs.Length > 0 && !Path.IsPathRooted(sysfs)) throw new ConfigurationException($"{what}: sysfsdev expects an absolute path, found '{sysfs}'");
        string path = sysfs.Length > 0 ? sysfs.TrimEnd('/') : PciPath(host, paths)
            ?? throw new ConfigurationException($"{what}: host expects a PCI address such as 0000:01:00.0, found '{host}'");
        return new VfioDeviceChoice(path, iommufd == "auto" ? null : OptionList.Bool(iommufd, $"{what}: option 'iommufd'"));
    }

    /// <summary>The folder of a PCI function; null when the text is no address. The domain may be left out.</summary>
    internal static string? PciPath(string address, VfioHostPaths paths)
    {
        string[] parts = address.Split(':', '.');
        string[] full = parts.Length == 3 ? ["0000", .. parts] : parts;
        bool ok = full.Length == 4 && full[0].Length is >= 4 and <= 8 && full[1].Length == 2 && full[2].Length == 2 && full[3].Length == 1
            && full.All(static p => p.All(char.IsAsciiHexDigit)) && address[^2] == '.';
        return ok ? Path.Combine(paths.PciDevices, $"{full[0]}:{full[1]}:{full[2]}.{full[3]}".ToLowerInvariant()) : null;
    }
}

/// <summary>What sysfs says of one device. Reading it changes nothing and needs no privilege.</summary>
internal sealed record VfioHostDevice
{
    /// <summary>Its folder.</summary>
    internal required string SysfsPath { get; init; }

    /// <summary>PCI address or UUID, as the kernel wants it for GROUP_GET_DEVICE_FD.</summary>
    internal required string Name { get; init; }

    /// <summary>Driver that is bound to it, or null.</summary>
    internal string? Driver { get; init; }

    /// <summary>It is a mediated device, which always belongs to VFIO.</summary>
    internal bool IsMediated { get; init; }

    /// <summary>IOMMU group, or null.</summary>
    internal string? Group { get; init; }

    /// <summary>Everything in that group, this device included.</summary>
    internal IReadOnlyList<(string Name, string? Driver)> GroupMembers { get; init; } = [];

    /// <summary>Name of its VFIO device, <c>vfioN</c>; null when no VFIO driver has it, and on kernels before 6.1.</summary>
    internal string? VfioName { get; init; }

    /// <summary><c>major:minor</c> of its character device; null when the kernel makes none.</summary>
    internal string? CdevNumber { get; init; }

    /// <summary>A VFIO driver is bound to it: vfio-pci, a vendor's variant, or the parent driver of a mediated device.</summary>
    internal bool HasVfioDriver => IsMediated || VfioName is not null || (Driver?.Contains("vfio", StringComparison.Ordinal) ?? false);

    /// <summary>Reads one device.</summary>
    /// <param name="path">Its folder, or a link to it.</param>
    /// <returns>The facts.</returns>
    /// <exception cref="VfioException">There is no such folder.</exception>
    internal static VfioHostDevice Read(string path)
    {
        if (!Directory.Exists(path)) throw VfioOpenErrors.NoSuchDevice(path);
        string members = Path.Combine(path, "iommu_group", "devices");
        string vfio = Path.Combine(path, "vfio-dev");
        string? vfioName = Directory.Exists(vfio) ? Directory.EnumerateDirectories(vfio, "vfio*").Select(Path.GetFileName).Order(StringComparer.Ordinal).FirstOrDefault() : null;
        string number = Path.Combine(vfio, vfioName ?? string.Empty, "dev");
        return new VfioHostDevice
        {
            SysfsPath = path,
            Name = Path.GetFileName(path),
            Driver = LinkName(path, "driver"),
            IsMediated = LinkName(path, "subsystem") == "mdev",
            Group = LinkName(path, "iommu_group"),
            GroupMembers = !Directory.Exists(members) ? []
                : [.. Directory.EnumerateFileSystemEntries(members).Order(StringComparer.Ordinal).Select(static m => (Path.GetFileName(m), LinkName(m, "driver")))],
            VfioName = vfioName,
            CdevNumber = vfioName is not null && File.Exists(number) ? File.ReadAllText(number).Trim() : null,
        };
    }

    /// <summary>Last part of where a link leads, or null.</summary>
    internal static string? LinkName(string folder, string link) =>
        new FileInfo(Path.Combine(folder, link)).LinkTarget is { } target ? Path.GetFileName(target.TrimEnd('/')) : null;
}
