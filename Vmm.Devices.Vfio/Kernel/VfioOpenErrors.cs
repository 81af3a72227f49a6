using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>The errors of opening a device of the host: the message says what is wrong, and the hint what to do.</summary>
internal static class VfioOpenErrors
{
    internal static VfioException NoSuchDevice(string path) =>
        Make($"{Path.GetFileName(path)}: no such device ({path} does not exist)", Errno.ENODEV, "'vmm vfio probe' lists the devices of this host");

    internal static VfioException WrongDriver(VfioHostDevice device)
    {
        string unbind = device.Driver is null ? string.Empty : $"echo {device.Name} > {device.SysfsPath}/driver/unbind; ";
        return Make(device.Driver is null ? $"{device.Name}: no driver has the device, vfio-pci is needed" : $"{device.Name}: driver '{device.Driver}' has the device, vfio-pci is needed",
            Errno.ENODEV, $"modprobe vfio-pci; echo vfio-pci > {device.SysfsPath}/driver_override; {unbind}echo {device.Name} > /sys/bus/pci/drivers_probe");
    }

    internal static VfioException NoIommuGroup(VfioHostDevice device) =>
        Make($"{device.Name}: the device is in no IOMMU group", Errno.ENODEV, "switch the IOMMU on in the firmware and in the kernel (intel_iommu=on; AMD needs no parameter)");

    internal static VfioException NotViable(VfioHostDevice device)
    {
        string[] others = [.. device.GroupMembers.Where(m => m.Name != device.Name).Select(static m => $"{m.Name} ({(m.Driver is null ? "no driver" : $"driver {m.Driver}")})")];
        return Make($"{device.Name}: IOMMU group {device.Group} is not viable: not every member has a VFIO driver or none; other members: {(others.Length > 0 ? string.Join(", ", others) : "none")}",
            Errno.EPERM, "bind the other members to vfio-pci too, or unbind them from their drivers");
    }

    internal static VfioException GroupNode(VfioHostDevice device, string node, Errno errno) => errno switch
    {
        Errno.EBUSY => Make($"{device.Name}: IOMMU group {device.Group} is in use: {node} is open already", errno, $"end the program that 'fuser {node}' names"),
        Errno.ENOENT => Make($"{device.Name}: {node} does not exist although a VFIO driver has the device", errno, "in a container the node must be passed in"),
        _ => Node(device.Name, node, errno),
    };

    internal static VfioException ContainerNode(string node, Errno errno) => errno == Errno.ENOENT
        ? Make($"{node} does not exist: this kernel has no VFIO, or it is not loaded", errno, "modprobe vfio-pci; in a container the node must be passed in")
        : Node("VFIO container", node, errno);

    internal static VfioException ApiVersion(string node, int found) => Make($"{node}: VFIO API version {found}, 0 is needed", Errno.EPROTO, null);

    internal static VfioException NoType1v2(string node) =>
        Make($"{node}: the kernel has no type1v2 IOMMU backend", Errno.EOPNOTSUPP, "modprobe vfio_iommu_type1; switch the IOMMU on in the firmware");

    internal static VfioException SetIommu(string group, Errno errno) => Make($"IOMMU group {group}: the container refused the group's IOMMU: {Posix.Describe(errno)}", errno,
        errno == Errno.EPERM ? "the host has no interrupt remapping; vfio_iommu_type1.allow_unsafe_interrupts=1 accepts that" : null);

    internal static VfioException DeviceFd(VfioHostDevice device, Errno errno) => Make($"{device.Name}: IOMMU group {device.Group} does not give the device: {Posix.Describe(errno)}", errno,
        errno == Errno.ENODEV ? "the device left its VFIO driver meanwhile" : null);

    internal static VfioException NoCdev(VfioHostDevice device) =>
        Make($"{device.Name}: iommufd=on, but the kernel offers no character device for it", Errno.ENODEV, "the kernel needs VFIO_DEVICE_CDEV; iommufd=off uses the IOMMU group");

    internal static VfioException IommufdNode(string node, Errno errno) => errno == Errno.ENOENT
        ? Make($"{node} does not exist: this kernel has no iommufd, or it is not loaded", errno, "modprobe iommufd; iommufd=off uses the IOMMU group")
        : Node("iommufd", node, errno);

    internal static VfioException CdevNode(VfioHostDevice device, string node, Errno errno) => errno switch
    {
        Errno.ENOENT => Make($"{device.Name}: {node} does not exist although the kernel has the character device", errno, "in a container the node must be passed in; iommufd=off uses the IOMMU group"),
        Errno.EBUSY => Make($"{device.Name}: the device is in use: {node} is open already", errno, $"end the program that 'fuser {node}' names"),
        _ => Node(device.Name, node, errno),
    };

    internal static VfioException CdevMismatch(VfioHostDevice device, string node, string found) =>
        Make($"{device.Name}: {node} is device {found}, the kernel says {device.CdevNumber}", Errno.ENODEV, "the node is stale; let devtmpfs or udev make it");

    internal static VfioException Bind(VfioHostDevice device, string node, Errno errno) => Make($"{device.Name}: {node} refused to be bound to iommufd: {Posix.Describe(errno)}", errno, errno switch
    {
        Errno.EBUSY => "the device or its IOMMU group is open elsewhere, perhaps through the group",
        Errno.EINVAL => "the device is bound by another open of the same node",
        _ => "iommufd=off uses the IOMMU group",
    });

    internal static VfioException Attach(string device, string to, Errno errno) => Make($"{device}: cannot attach to {to}: {Posix.Describe(errno)}", errno,
        errno == Errno.EPERM ? "the host has no interrupt remapping; iommufd.allow_unsafe_interrupts=1 accepts that" : null);

    private static VfioException Node(string owner, string node, Errno errno) => Make($"{owner}: cannot open {node}: {Posix.Describe(errno)}", errno,
        errno is Errno.EACCES or Errno.EPERM ? $"give this user read and write access to {node}, by a udev rule or chown" : null);

    private static VfioException Make(string message, Errno errno, string? hint) => new(message, errno) { Hint = hint };
}
