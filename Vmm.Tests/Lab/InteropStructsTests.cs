using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>
/// The interop layer's structures and numbers against a kernel: each ioctl gets our structure, and must return values that only the right
/// layout gives, or the errno that docs/spec/vfio-migration.md names. UapiLayoutTests compares the layouts with a compiler's.
/// </summary>
[TestFixture]
public sealed class InteropStructsTests : LabFixture
{
    private readonly KernelVfio _kernel = new();
    private readonly List<OwnedFd> _fds = [];
    private GuestMemory _memory = null!;
    private RamBlock _ram = null!;

    [SetUp]
    public void Allocate()
    {
        _memory = new GuestMemory();
        _ram = _memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 });
    }

    [TearDown]
    public void Close()
    {
        for (int i = _fds.Count - 1; i >= 0; i--) _fds[i].Dispose();
        _fds.Clear();
        _memory.Dispose();
    }

    [Test]
    public void Spec1_1_InteropStructsOfExtensionsKnowType1AndVaddrUpdates()
    {
        OwnedFd container = Open(LabVfio.Paths.Container);
        Assert.That(_kernel.Ioctl(container, VfioUapi.VFIO_GET_API_VERSION, 0, out _), Is.EqualTo(VfioUapi.VFIO_API_VERSION));
        Assert.That(Has(container, VfioUapi.VFIO_TYPE1v2_IOMMU), Is.EqualTo(1));
        Assert.That(Has(container, VfioUapi.VFIO_UPDATE_VADDR), Is.Zero, "before SET_IOMMU");
        Join(container, LabVfio.Edu, first: true);
        Assert.That(Has(container, VfioUapi.VFIO_UPDATE_VADDR), Is.EqualTo(1), "while all devices are physical");
        Join(container, LabVfio.Mtty1, first: false);
        Assert.That(Has(container, VfioUapi.VFIO_UPDATE_VADDR), Is.Zero, "while one device is an mdev");
    }

    [Test]
    public void Spec1_2_InteropStructsOfGroupsRefuseTheWrongOrder()
    {
        OwnedFd container = Open(LabVfio.Paths.Container);
        Assert.That(Call(container, VfioUapi.VFIO_SET_IOMMU, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU), Is.EqualTo(Errno.EINVAL), "SET_IOMMU without a group");
        OwnedFd group = Open(GroupOf(LabVfio.Mtty1));
        Assert.That(_kernel.Open(GroupOf(LabVfio.Mtty1), out Errno errno), Is.Null);
        Assert.That(errno, Is.EqualTo(Errno.EBUSY), "a group can be open only once");
        Assert.That(DeviceFd(group, LabVfio.Mtty1, out _), Is.EqualTo(Errno.EINVAL), "the group has no container yet");
        var status = new VfioUapi.GroupStatus { Argsz = 8 };
        Assert.That((_kernel.Call(group, VfioUapi.VFIO_GROUP_GET_STATUS, ref status), status.Flags), Is.EqualTo((Errno.None, VfioUapi.VFIO_GROUP_FLAGS_VIABLE)));
        Assert.That(SetContainer(group, container), Is.EqualTo(Errno.None));
        Assert.That(SetContainer(group, container), Is.EqualTo(Errno.EINVAL), "the group has a container already");
        Assert.That(Call(container, VfioUapi.VFIO_SET_IOMMU, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU), Is.EqualTo(Errno.None));
        Assert.That(Call(container, VfioUapi.VFIO_SET_IOMMU, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU), Is.EqualTo(Errno.EINVAL), "the IOMMU is set already");
        Assert.That(DeviceFd(group, "/nobody", out _), Is.EqualTo(Errno.ENODEV));
        Assert.That(DeviceFd(group, LabVfio.Mtty1, out OwnedFd? device), Is.EqualTo(Errno.None));
        Assert.That(Call(group, VfioUapi.VFIO_GROUP_UNSET_CONTAINER, 0), Is.EqualTo(Errno.EBUSY), "a device of the group is open");
        device!.Dispose();
        Assert.That(Call(group, VfioUapi.VFIO_GROUP_UNSET_CONTAINER, 0), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_3_InteropStructsOfIommufdBindAttachAndMap()
    {
        VfioHostDevice host = VfioHostDevice.Read(LabVfio.Edu);
        OwnedFd device = Open(LabVfio.Paths.Cdev(host.VfioName!)), iommufd = Open(LabVfio.Paths.Iommufd);
        var info = new VfioUapi.DeviceInfo { Argsz = 24 };
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_GET_INFO, ref info), Is.EqualTo(Errno.EINVAL), "the device is not bound yet");
        var bind = new VfioUapi.DeviceBindIommufd { Argsz = 16, Iommufd = iommufd.Number };
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_BIND_IOMMUFD, ref bind), Is.EqualTo(Errno.None));
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_BIND_IOMMUFD, ref bind), Is.EqualTo(Errno.EINVAL), "the device is bound already");
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_GET_INFO, ref info), Is.EqualTo(Errno.None));
        Assert.That(_kernel.Open(GroupOf(LabVfio.Edu), out Errno errno), Is.Null);
        Assert.That(errno, Is.EqualTo(Errno.EBUSY), "the device's group cannot be opened while the device is bound");

        var ioas = new IommufdUapi.IoasAlloc { Size = 12 };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_ALLOC, ref ioas), Is.EqualTo(Errno.None));
        var hardware = new IommufdUapi.HwInfo { Size = 40, DevId = bind.OutDevid };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_GET_HW_INFO, ref hardware), Is.EqualTo(Errno.None));
        Assert.That(hardware.OutCapabilities & IommufdUapi.IOMMU_HW_CAP_DIRTY_TRACKING, Is.Zero);
        var hwpt = new IommufdUapi.HwptAlloc { Size = 48, Flags = IommufdUapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING, DevId = bind.OutDevid, PtId = ioas.OutIoasId };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_HWPT_ALLOC, ref hwpt), Is.EqualTo(Errno.EOPNOTSUPP), "this IOMMU has no dirty bits");
        hwpt.Flags = 0;
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_HWPT_ALLOC, ref hwpt), Is.EqualTo(Errno.None));
        var attach = new VfioUapi.DeviceAttachIommufdPt { Argsz = 12, PtId = hwpt.OutHwptId };
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, ref attach), Is.EqualTo(Errno.None));

        var map = new IommufdUapi.IoasMap { Size = 40, Flags = 7, IoasId = ioas.OutIoasId, UserVa = (ulong)_ram.HostAddress, Length = 0x10000, Iova = 0x100000 };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_MAP, ref map), Is.EqualTo(Errno.None));
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_MAP, ref map), Is.EqualTo(Errno.EEXIST));
        var unmap = new IommufdUapi.IoasUnmap { Size = 24, IoasId = ioas.OutIoasId, Iova = 0x100000, Length = 0x1000 };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_UNMAP, ref unmap), Is.EqualTo(Errno.ENOENT), "a part of a mapping");
        unmap.Length = 0x10000;
        Assert.That((_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_UNMAP, ref unmap), unmap.Length), Is.EqualTo((Errno.None, 0x10000UL)));
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_IOAS_UNMAP, ref unmap), Is.EqualTo(Errno.ENOENT), "no mapping there");
    }

    [Test]
    public void Spec1_3_InteropStructsOfAnMdevHaveNoHardware()
    {
        VfioHostDevice host = VfioHostDevice.Read(LabVfio.Mtty1);
        OwnedFd device = Open(LabVfio.Paths.Cdev(host.VfioName!)), iommufd = Open(LabVfio.Paths.Iommufd);
        var bind = new VfioUapi.DeviceBindIommufd { Argsz = 16, Iommufd = iommufd.Number };
        Assert.That(_kernel.Call(device, VfioUapi.VFIO_DEVICE_BIND_IOMMUFD, ref bind), Is.EqualTo(Errno.None));
        var hardware = new IommufdUapi.HwInfo { Size = 40, DevId = bind.OutDevid };
        Assert.That(_kernel.Call(iommufd, IommufdUapi.IOMMU_GET_HW_INFO, ref hardware), Is.EqualTo(Errno.ENOENT));
    }

    [Test]
    public void Spec1_8_InteropStructsOfType1MapAndUnmap()
    {
        OwnedFd container = Open(LabVfio.Paths.Container);
        Join(container, LabVfio.Edu, first: true);
        var info = new VfioUapi.IommuType1Info();
        Assert.That(_kernel.CallForInfo(container, VfioUapi.VFIO_IOMMU_GET_INFO, ref info, out byte[] answer), Is.EqualTo(Errno.None));
        Assert.That((info.Flags, answer.Length), Is.EqualTo((3u, (int)info.Argsz)));
        Assert.That(info.IovaPgsizes & 0x1000, Is.Not.Zero);
        int migration = (int)info.CapOffset;
        while (BinaryPrimitives.ReadUInt16LittleEndian(answer.AsSpan(migration)) != VfioUapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION)
        {
            migration = BinaryPrimitives.ReadInt32LittleEndian(answer.AsSpan(migration + 4));
            Assert.That(migration, Is.Positive, "the info has a MIGRATION capability");
        }
        var capability = Ioctl.Read<VfioUapi.IommuType1InfoCapMigration>(answer.AsSpan(migration, Marshal.SizeOf<VfioUapi.IommuType1InfoCapMigration>()));
        Assert.That((capability.PgsizeBitmap, capability.MaxDirtyBitmapSize), Is.EqualTo((0x1000UL, 0x10000000UL)));

        Assert.That(Map(container, 0, 0x10000, 3), Is.EqualTo(Errno.None));
        Assert.That(Map(container, 0x1000, 0x1000, 3), Is.EqualTo(Errno.EEXIST));
        Assert.That(Map(container, 0x20000, 0x1000, 0), Is.EqualTo(Errno.EINVAL), "neither read nor write");
        Assert.That(Map(container, 0x20000, 0x800, 3), Is.EqualTo(Errno.EINVAL), "not whole pages");
        Assert.That(Map(container, 0xfee00000, 0x1000, 3), Is.EqualTo(Errno.EINVAL), "the reserved MSI window");
        Assert.That(Unmap(container, 0, 0x1000, 0), Is.EqualTo((Errno.EINVAL, 0x1000UL)).Or.EqualTo((Errno.EINVAL, 0UL)), "a range that cuts a mapping");
        Assert.That(Unmap(container, 0x100000, 0x1000, 0), Is.EqualTo((Errno.None, 0UL)), "a range without mappings");
        Assert.That(Unmap(container, 0, 0x10000, VfioUapi.VFIO_DMA_UNMAP_FLAG_VADDR), Is.EqualTo((Errno.None, 0x10000UL)));
        Assert.That(Unmap(container, 0, 0x10000, VfioUapi.VFIO_DMA_UNMAP_FLAG_VADDR).Item1, Is.EqualTo(Errno.EINVAL), "the vaddr is invalid already");
        Assert.That(Map(container, 0x40000, 0x1000, VfioUapi.VFIO_DMA_MAP_FLAG_VADDR), Is.EqualTo(Errno.ENOENT));
        Assert.That(Map(container, 0, 0x8000, VfioUapi.VFIO_DMA_MAP_FLAG_VADDR), Is.EqualTo(Errno.EINVAL), "another size than the mapping's");
        Assert.That(Map(container, 0, 0x10000, VfioUapi.VFIO_DMA_MAP_FLAG_VADDR), Is.EqualTo(Errno.None));
        Assert.That(Unmap(container, 0, ulong.MaxValue & ~0xfffUL, VfioUapi.VFIO_DMA_UNMAP_FLAG_ALL).Item1, Is.EqualTo(Errno.EINVAL));
        Assert.That(Unmap(container, 0, 0, VfioUapi.VFIO_DMA_UNMAP_FLAG_ALL), Is.EqualTo((Errno.None, 0x10000UL)));
    }

    [Test]
    public void Spec1_9_InteropStructsOfTheDirtyLogWithAnMdevFindNothing()
    {
        using var lab = new LabVfio();
        KernelVfioDeviceIo mtty = lab.Open(LabVfio.Mtty1, iommufd: false);
        ulong[] bitmap = new ulong[4];
        Assert.That(mtty.Container.GetDirtyBitmap(lab.Ram.Range, bitmap), Is.EqualTo(Errno.EINVAL), "the log is not started");
        Assert.That((mtty.Container.StartDirtyLog(), mtty.Container.StartDirtyLog()), Is.EqualTo((Errno.None, Errno.None)), "idempotent");
        Assert.That(mtty.Container.GetDirtyBitmap(lab.Ram.Range, bitmap), Is.EqualTo(Errno.None));
        Assert.That(bitmap, Is.All.Zero);
        Assert.That((mtty.Container.StopDirtyLog(), mtty.Container.StopDirtyLog()), Is.EqualTo((Errno.None, Errno.None)), "idempotent");
    }

    [Test]
    public void Spec1_11_InteropStructsOfDmaLogging([Values] bool iommufd)
    {
        using var lab = new LabVfio();
        KernelVfioDeviceIo mtty = lab.Open(LabVfio.Mtty1, iommufd);
        Assert.That(mtty.StartDmaLog(4096, [], out _), Is.EqualTo(Errno.EINVAL));
        Assert.That(mtty.StartDmaLog(4096, [.. Enumerable.Range(0, 257).Select(static i => new GuestRange(new((ulong)i << 13), 4096))], out _), Is.EqualTo(Errno.E2BIG));
        Assert.That(mtty.StartDmaLog(4096, [new(new(0), 0x2000), new(new(0x1000), 0x2000)], out _), Is.EqualTo(Errno.EINVAL), "ranges that overlap");
        Assert.That(mtty.StartDmaLog(4096, [lab.Ram.Range], out _), Is.EqualTo(Errno.None));
        ulong[] bitmap = new ulong[4];
        Assert.That(mtty.ReportDmaLog(lab.Ram.Range, 3000, bitmap), Is.EqualTo(Errno.EINVAL), "a page size that is no power of two");
        Assert.That(mtty.ReportDmaLog(lab.Ram.Range, 4096, bitmap), Is.EqualTo(Errno.None));
        Assert.That(mtty.StopDmaLog(), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_11_InteropStructsOfFeaturesAreCheckedByTheKernel()
    {
        using var lab = new LabVfio();
        KernelVfioDeviceIo mtty = lab.Open(LabVfio.Mtty1, iommufd: false);
        Errno Ask(uint flags, params byte[] data)
        {
            byte[] request = [.. BitConverter.GetBytes(8 + data.Length), .. BitConverter.GetBytes(flags), .. data];
            _kernel.Ioctl(mtty.Fd, VfioUapi.VFIO_DEVICE_FEATURE, request, out Errno errno);
            return errno;
        }

        uint get = (uint)VfioFeatureOp.Get, set = (uint)VfioFeatureOp.Set, probe = (uint)VfioFeatureOp.Probe, migration = (uint)VfioDeviceFeature.Migration;
        Assert.Multiple(() =>
        {
            Assert.That(Ask(migration | get, new byte[8]), Is.EqualTo(Errno.None));
            Assert.That(Ask(migration | get | probe), Is.EqualTo(Errno.None));
            Assert.That(Ask(migration, new byte[8]), Is.EqualTo(Errno.EINVAL), "none of GET, SET and PROBE");
            Assert.That(Ask(migration | get | set, new byte[8]), Is.EqualTo(Errno.EINVAL), "GET and SET without PROBE");
            Assert.That(Ask(migration | set, new byte[8]), Is.EqualTo(Errno.EINVAL), "unsupported direction");
            Assert.That(Ask(migration | get, new byte[4]), Is.EqualTo(Errno.EINVAL), "too short");
            Assert.That(Ask(migration | get | 0x80000, new byte[8]), Is.EqualTo(Errno.EINVAL), "unknown flag");
            Assert.That(Ask((uint)VfioDeviceFeature.MigPrecopyInfoV2 | set), Is.EqualTo(Errno.ENOTTY), "a feature newer than this kernel");
        });
    }

    private static string GroupOf(string device) => LabVfio.Paths.Group(VfioHostDevice.Read(device).Group!);

    private OwnedFd Open(string path)
    {
        OwnedFd fd = _kernel.Open(path, out Errno errno) ?? throw new AssertionException($"{path}: {errno}");
        _fds.Add(fd);
        return fd;
    }

    private void Join(OwnedFd container, string device, bool first)
    {
        Assert.That(SetContainer(Open(GroupOf(device)), container), Is.EqualTo(Errno.None));
        if (first) Assert.That(Call(container, VfioUapi.VFIO_SET_IOMMU, (nint)VfioUapi.VFIO_TYPE1v2_IOMMU), Is.EqualTo(Errno.None));
    }

    private Errno SetContainer(OwnedFd group, OwnedFd container)
    {
        _kernel.Ioctl(group, VfioUapi.VFIO_GROUP_SET_CONTAINER, BitConverter.GetBytes(container.Number), out Errno errno);
        return errno;
    }

    private Errno DeviceFd(OwnedFd group, string path, out OwnedFd? fd)
    {
        int number = _kernel.Ioctl(group, VfioUapi.VFIO_GROUP_GET_DEVICE_FD, [.. System.Text.Encoding.ASCII.GetBytes(Path.GetFileName(path)), 0], out Errno errno);
        fd = number >= 0 ? new OwnedFd(number) : null;
        if (fd is not null) _fds.Add(fd);
        return errno;
    }

    private Errno Map(OwnedFd container, ulong iova, ulong size, uint flags)
    {
        var map = new VfioUapi.IommuType1DmaMap { Argsz = 32, Flags = flags, Vaddr = (ulong)_ram.HostAddress, Iova = iova, Size = size };
        return _kernel.Call(container, VfioUapi.VFIO_IOMMU_MAP_DMA, ref map);
    }

    private (Errno, ulong) Unmap(OwnedFd container, ulong iova, ulong size, uint flags)
    {
        var unmap = new VfioUapi.IommuType1DmaUnmap { Argsz = 24, Flags = flags, Iova = iova, Size = size };
        Errno errno = _kernel.Call(container, VfioUapi.VFIO_IOMMU_UNMAP_DMA, ref unmap);
        return (errno, unmap.Size);
    }

    private Errno Call(OwnedFd fd, uint request, nint value)
    {
        _kernel.Ioctl(fd, request, value, out Errno errno);
        return errno;
    }

    private int Has(OwnedFd container, uint extension) => _kernel.Ioctl(container, VfioUapi.VFIO_CHECK_EXTENSION, (nint)extension, out _);
}
