using System.Globalization;
using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// The containers of one VM, as few as the host allows. Each maps the VM's RAM while it has a device and is closed with its last device (QEMU:
/// <c>VFIOAddressSpace</c>). BQL: held for every call.
/// </summary>
internal sealed class VfioContainers(GuestMemory memory, IVfioKernel kernel, VfioHostPaths paths, ILoggerFactory loggers) : IDisposable
{
    private readonly ILogger _logger = loggers.CreateLogger("Vmm.Devices.Vfio");
    private readonly Dictionary<KernelContainer, IDisposable> _listening = [];
    private readonly Dictionary<string, VfioGroup> _groups = new(StringComparer.Ordinal);
    private OwnedFd? _iommufd;
    private bool _disposed;

    /// <summary>The host.</summary>
    internal VfioHostPaths Paths => paths;

    /// <summary>Containers in use.</summary>
    internal IEnumerable<KernelContainer> All => _listening.Keys;

    /// <summary>Opens a device and puts it into a container.</summary>
    /// <param name="choice">Which and how.</param>
    /// <param name="cpr">The VM's descriptors; those that the process before this one left are used instead of new ones.</param>
    /// <returns>The device; disposing it removes it from its container.</returns>
    /// <exception cref="VmmException">The host or its kernel refused, or a descriptor did not come; nothing is left open.</exception>
    internal KernelVfioDeviceIo Open(VfioDeviceChoice choice, CprFdTable? cpr = null)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        VfioHostDevice device = VfioHostDevice.Read(choice.SysfsPath);
        if (!device.HasVfioDriver) throw VfioOpenErrors.WrongDriver(device);
        if (choice.UseIommufd == true && device.CdevNumber is null) throw VfioOpenErrors.NoCdev(device);
        bool byCdev = choice.UseIommufd ?? (device.CdevNumber is not null && File.Exists(paths.Iommufd));
        bool arrives = cpr?.IsIncoming == true;
        if (arrives && byCdev) throw new VfioException($"{device.Name}: {IommufdContainer.NoCpr}", Errno.EOPNOTSUPP);
        (OwnedFd fd, KernelContainer container, IDisposable seat) = byCdev ? OpenCdev(device) : OpenInGroup(device, cpr);
        var io = new KernelVfioDeviceIo(device.Name, fd, kernel, container, _logger, seat) { IsArriving = arrives, IsMediated = device.IsMediated };
        try
        {
            if (!arrives) io.LeaveStaleState();
        }
        catch
        {
            io.Dispose();
            throw;
        }
        VfioKernelLog.Opened(_logger, device.Name, byCdev ? "its character device" : $"group {device.Group}", container.Name);
        return io;
    }

    /// <summary>Closes what devices that were never disposed have left open.</summary>
    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        foreach (VfioGroup group in _groups.Values.ToArray()) LeaveGroup(group);
        foreach (KernelContainer container in _listening.Keys.ToArray()) Close(container);
        _iommufd?.Dispose();
    }

    private (OwnedFd, KernelContainer, IDisposable) OpenInGroup(VfioHostDevice device, CprFdTable? cpr)
    {
        string number = device.Group ?? throw VfioOpenErrors.NoIommuGroup(device);
        if (!_groups.TryGetValue(number, out VfioGroup? group))
        {
            _groups.Add(number, group = cpr?.IsIncoming == true ? InheritGroup(number, cpr) : JoinGroup(device));
            group.Enter(cpr);
        }
        try
        {
            OwnedFd fd = cpr?.IsIncoming == true ? cpr.Require(device.Name, 0) : group.GetDevice(device);
            group.Users++;
            return (fd, group.Container!, new Core.Registration(() =>
            {
                if (--group.Users == 0 && !_disposed) LeaveGroup(group);
            }));
        }
        catch
        {
            if (group.Users == 0) LeaveGroup(group);
            throw;
        }
    }

    /// <summary>Opens a group and adds it to a container that accepts it, or to a new one.</summary>
    private VfioGroup JoinGroup(VfioHostDevice device)
    {
        Type1Container[] present = [.. _listening.Keys.OfType<Type1Container>()];
        Type1Container? fresh = present.Length == 0 ? Type1Container.Open(kernel, paths, _logger) : null;
        VfioGroup? group = null;
        try
        {
            group = VfioGroup.Open(device, kernel, paths);
            foreach (Type1Container container in present)
                if (container.TryAdd(group) == Errno.None) return group;
            fresh ??= Type1Container.Open(kernel, paths, _logger);
            Errno errno = fresh.TryAdd(group);
            if (errno != Errno.None) throw VfioOpenErrors.SetIommu(group.Number, errno);
            _listening.Add(fresh, memory.AddListener(fresh));
            return group;
        }
        catch
        {
            if (group?.Container is not null) group.Container.Remove(group);
            group?.Dispose();
            fresh?.Dispose();
            throw;
        }
    }

    /// <summary>Takes over a group that another process has opened and put into a container; asks the kernel for the container's info only.</summary>
    private VfioGroup InheritGroup(string number, CprFdTable cpr)
    {
        if (!int.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out int id)) throw new VfioException($"IOMMU group '{number}' has no number", Errno.EINVAL);
        OwnedFd fd = cpr.Require(VfioGroup.CprContainerName, id);
        Type1Container? container = _listening.Keys.OfType<Type1Container>().FirstOrDefault(c => Posix.IsSameFile(c.Fd, fd));
        bool isNew = container is null;
        container ??= Type1Container.Inherit(fd, kernel, _logger);
        if (!isNew) fd.Dispose();
        VfioGroup? group = null;
        try
        {
            group = VfioGroup.Inherit(number, cpr.Require(VfioGroup.CprName, id), kernel);
            Errno errno = container.Adopt(group);
            if (errno != Errno.None) throw VfioOpenErrors.SetIommu(number, errno);
            if (isNew) _listening.Add(container, memory.AddListener(container));
            return group;
        }
        catch
        {
            if (group is not null) container.Remove(group);
            group?.Dispose();
            if (isNew) container.Dispose();
            throw;
        }
    }

    private void LeaveGroup(VfioGroup group)
    {
        _groups.Remove(group.Number);
        Type1Container container = group.Container!;
        // Unmapping comes first: a container without groups has no IOMMU to unmap from.
        bool last = container.GroupCount == 1;
        if (last && _listening.Remove(container, out IDisposable? listening)) listening.Dispose();
        container.Remove(group);
        group.Dispose();
        if (last) container.Dispose();
    }

    private (OwnedFd, KernelContainer, IDisposable) OpenCdev(VfioHostDevice device)
    {
        string node = paths.Cdev(device.VfioName!);
        OwnedFd fd = kernel.Open(node, out Errno errno) ?? throw VfioOpenErrors.CdevNode(device, node, errno);
        try
        {
            errno = kernel.DeviceNumber(fd, out string number);
            if (errno != Errno.None || number != device.CdevNumber) throw VfioOpenErrors.CdevMismatch(device, node, errno == Errno.None ? number : errno.ToString());
            _iommufd ??= kernel.Open(paths.Iommufd, out errno) ?? throw VfioOpenErrors.IommufdNode(paths.Iommufd, errno);
            uint deviceId = Bind(device, node, fd, _iommufd);
            (IommufdContainer container, IDisposable seat) = Attach(device, fd, deviceId);
            return (fd, container, new Core.Registration(() =>
            {
                if (_disposed) return;
                // Page tables are destroyed before RAM is unmapped, which saves the kernel from removing each mapping from them.
                seat.Dispose();
                if (container.DeviceCount == 0) Close(container);
            }));
        }
        catch
        {
            fd.Dispose();
            CloseUnusedIommufd();
            throw;
        }
    }

    private uint Bind(VfioHostDevice device, string node, OwnedFd fd, OwnedFd iommufd)
    {
        // 16 bytes, the structure's length before tokens: every kernel accepts it.
        var bind = new VfioUapi.DeviceBindIommufd { Argsz = (uint)Marshal.OffsetOf<VfioUapi.DeviceBindIommufd>(nameof(VfioUapi.DeviceBindIommufd.TokenUuidPtr)) };
        (Errno errno, uint id) = iommufd.Lend(number =>
        {
            bind.Iommufd = number;
            return (kernel.Call(fd, VfioUapi.VFIO_DEVICE_BIND_IOMMUFD, ref bind), bind.OutDevid);
        });
        return errno == Errno.None ? id : throw VfioOpenErrors.Bind(device, node, errno);
    }

    /// <summary>Attaches a device to an address space that accepts it, or to a new one.</summary>
    private (IommufdContainer Container, IDisposable Seat) Attach(VfioHostDevice device, OwnedFd fd, uint deviceId)
    {
        foreach (IommufdContainer container in _listening.Keys.OfType<IommufdContainer>())
        {
            if (container.TryAttach(fd, deviceId, out IDisposable? old) == Errno.None) return (container, old!);
        }
        IommufdContainer fresh = IommufdContainer.Allocate(_iommufd!, kernel, _logger);
        IDisposable? seat = null;
        try
        {
            Errno errno = fresh.TryAttach(fd, deviceId, out seat);
            if (errno != Errno.None) throw VfioOpenErrors.Attach(device.Name, fresh.Name, errno);
            _listening.Add(fresh, memory.AddListener(fresh));
            return (fresh, seat!);
        }
        catch
        {
            // The page table can be destroyed only after the device was closed.
            fd.Dispose();
            seat?.Dispose();
            fresh.Dispose();
            throw;
        }
    }

    private void Close(KernelContainer container)
    {
        if (!_listening.Remove(container, out IDisposable? listening)) return;
        listening.Dispose();
        container.Dispose();
        CloseUnusedIommufd();
    }

    private void CloseUnusedIommufd()
    {
        if (_listening.Keys.Any(static c => c is IommufdContainer)) return;
        _iommufd?.Dispose();
        _iommufd = null;
    }
}
