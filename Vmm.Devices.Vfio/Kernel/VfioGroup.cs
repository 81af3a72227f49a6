using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>One open IOMMU group; the kernel lets only one process at a time open it (vfio-migration 1.2).</summary>
internal sealed class VfioGroup : IDisposable
{
    private readonly IVfioKernel _kernel;

    private VfioGroup(string number, OwnedFd fd, IVfioKernel kernel) => (Number, Fd, _kernel) = (number, fd, kernel);

    /// <summary>Its number in sysfs.</summary>
    internal string Number { get; }

    /// <summary>Its descriptor.</summary>
    internal OwnedFd Fd { get; }

    /// <summary>Number of its devices that are open in this process.</summary>
    internal int Users { get; set; }

    /// <summary>Its container; null before it has one.</summary>
    internal Type1Container? Container { get; set; }

    /// <summary>Opens the group of a device and checks that every device of the group has a VFIO driver or none.</summary>
    /// <exception cref="VfioException">The group cannot be used; the message names the device or process that prevents it.</exception>
    internal static VfioGroup Open(VfioHostDevice device, IVfioKernel kernel, VfioHostPaths paths)
    {
        string number = device.Group ?? throw VfioOpenErrors.NoIommuGroup(device);
        string node = paths.Group(number);
        OwnedFd fd = kernel.Open(node, out Errno errno) ?? throw VfioOpenErrors.GroupNode(device, node, errno);
        var status = new VfioUapi.GroupStatus { Argsz = (uint)Marshal.SizeOf<VfioUapi.GroupStatus>() };
        errno = kernel.Call(fd, VfioUapi.VFIO_GROUP_GET_STATUS, ref status);
        if (errno == Errno.None && (status.Flags & VfioUapi.VFIO_GROUP_FLAGS_VIABLE) != 0) return new VfioGroup(number, fd, kernel);
        fd.Dispose();
        throw errno == Errno.None ? VfioOpenErrors.NotViable(device) : VfioOpenErrors.GroupNode(device, node, errno);
    }

    /// <summary>Names of its descriptor and its container's in the VM's table, under which the next process finds them.</summary>
    internal const string CprName = "vfio_group", CprContainerName = "vfio_container_for_group";

    private readonly List<IDisposable> _entered = [];

    /// <summary>A group that another process opened.</summary>
    internal static VfioGroup Inherit(string number, OwnedFd fd, IVfioKernel kernel) => new(number, fd, kernel);

    /// <summary>Adds its descriptor and its container's to the VM's table.</summary>
    internal void Enter(CprFdTable? table)
    {
        if (table is null || !int.TryParse(Number, NumberStyles.None, CultureInfo.InvariantCulture, out int id)) return;
        _entered.AddRange([table.Save(CprName, id, Fd), table.Save(CprContainerName, id, Container!.Fd)]);
    }

    /// <summary>Gets a descriptor of one of its devices; only once the group is in a container.</summary>
    /// <exception cref="VfioException">The kernel refused.</exception>
    internal OwnedFd GetDevice(VfioHostDevice device)
    {
        byte[] name = [.. Encoding.UTF8.GetBytes(device.Name), 0];
        int fd = _kernel.Ioctl(Fd, VfioUapi.VFIO_GROUP_GET_DEVICE_FD, name, out Errno errno);
        return errno == Errno.None ? new OwnedFd(fd) : throw VfioOpenErrors.DeviceFd(device, errno);
    }

    public void Dispose()
    {
        foreach (IDisposable one in _entered) one.Dispose();
        _entered.Clear();
        Fd.Dispose();
    }
}
