using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>When a device cannot be opened, the error names the cause, the hint says what to do, and nothing stays open.</summary>
internal sealed class KernelOpenErrorTests
{
    private const string Address = "0000:00:01.0";
    private FakeVfioHost _host = null!;

    [SetUp]
    public void SetUp() => _host = new FakeVfioHost();

    [TearDown]
    public void TearDown() => _host.Dispose();

    [TestCase("", "host= and sysfsdev=")]
    [TestCase("host=0000:00:01.0,sysfsdev=/sys/x", "host= and sysfsdev=")]
    [TestCase("host=00:1", "PCI address")]
    [TestCase("host=0000:00:01:0", "PCI address")]
    [TestCase("host=../../../etc", "PCI address")]
    [TestCase("sysfsdev=relative/path", "absolute path")]
    [TestCase("host=0000:00:01.0,iommufd=maybe", "on or off")]
    public void An_option_that_names_no_device_is_refused(string options, string expected)
    {
        string text = options.Length == 0 ? "id=x" : options;
        Assert.That(() => _host.Open(text), Throws.TypeOf<ConfigurationException>().With.Message.Contains(expected));
        Assert.That(_host.Kernel.Calls, Is.Empty);
    }

    [TestCase("0000:00:01.0")]
    [TestCase("00:01.0")]
    public void A_device_that_is_not_there_is_named(string host) => Expect($"host={host}", Errno.ENODEV, "no such device", "0000:00:01.0", "vmm vfio probe");

    [Test]
    public void A_driver_that_is_not_vfio_is_named()
    {
        _host.AddPci(Address, driver: "e1000e");
        Expect($"host={Address}", Errno.ENODEV, "driver 'e1000e'", Address, "driver_override");
    }

    [Test]
    public void A_device_without_driver_is_told_so()
    {
        _host.AddPci(Address, driver: null);
        Expect($"host={Address}", Errno.ENODEV, "no driver", Address, "drivers_probe");
    }

    [Test]
    public void A_vendors_vfio_driver_is_as_good()
    {
        _host.AddPci(Address, driver: "mlx5_vfio_pci");
        using KernelVfioDeviceIo io = _host.Open($"host={Address}");
        Assert.That(io.Name, Is.EqualTo(Address));
    }

    [Test]
    public void A_device_without_group_is_told_so()
    {
        _host.AddPci(Address, group: null);
        Expect($"host={Address}", Errno.ENODEV, "no IOMMU group", Address, "intel_iommu=on");
    }

    [TestCase(Errno.ENOENT, "vfio/vfio does not exist", "modprobe")]
    [TestCase(Errno.EACCES, "cannot open", "read and write access")]
    [TestCase(Errno.EPERM, "cannot open", "read and write access")]
    public void The_containers_node_that_cannot_be_opened_is_named(Errno errno, string message, string hint)
    {
        _host.AddPci(Address);
        _host.Kernel.Failures["open vfio/vfio"] = errno;
        Expect($"host={Address}", errno, message, "vfio/vfio", hint);
    }

    [Test]
    public void Another_api_version_is_refused()
    {
        _host.AddPci(Address);
        _host.Kernel.ApiVersion = 1;
        Expect($"host={Address}", Errno.EPROTO, "API version 1", "0 is needed", null);
    }

    [Test]
    public void A_kernel_without_type1v2_is_refused()
    {
        _host.AddPci(Address);
        _host.Kernel.Extensions.Remove(VfioUapi.VFIO_TYPE1v2_IOMMU);
        Expect($"host={Address}", Errno.EOPNOTSUPP, "type1v2", "vfio/vfio", "vfio_iommu_type1");
    }

    [TestCase(Errno.ENOENT, "does not exist", "passed in")]
    [TestCase(Errno.EACCES, "cannot open", "read and write access")]
    [TestCase(Errno.EPERM, "cannot open", "read and write access")]
    [TestCase(Errno.EBUSY, "in use", "fuser")]
    [TestCase(Errno.EMFILE, "cannot open", null)]
    public void A_groups_node_that_cannot_be_opened_is_named(Errno errno, string message, string? hint)
    {
        _host.AddPci(Address);
        _host.Kernel.Failures["open vfio/7"] = errno;
        Expect($"host={Address}", errno, message, "vfio/7", hint);
    }

    [Test]
    public void A_group_that_is_not_viable_names_its_other_members_and_their_drivers()
    {
        _host.AddPci(Address);
        _host.AddPci("0000:00:01.1", driver: "snd_hda_intel");
        _host.AddPci("0000:00:01.2", driver: null);
        _host.AddPci("0000:00:02.0", driver: "nvme", group: "8");
        _host.Kernel.IsViable = false;
        VfioException error = Expect($"host={Address}", Errno.EPERM, "group 7 is not viable", "0000:00:01.1 (driver snd_hda_intel), 0000:00:01.2 (no driver)", "unbind");
        Assert.That(error.Message, Does.Not.Contain("nvme"));
    }

    [TestCase("GET_STATUS", Errno.EIO, "cannot open", null)]
    [TestCase("SET_CONTAINER", Errno.EINVAL, "refused the group's IOMMU", null)]
    [TestCase("SET_IOMMU", Errno.EPERM, "refused the group's IOMMU", "allow_unsafe_interrupts")]
    [TestCase("GET_DEVICE_FD", Errno.ENODEV, "does not give the device", "left its VFIO driver")]
    [TestCase("container: GET_INFO", Errno.EIO, "refused the group's IOMMU", null)]
    [TestCase("device: GET_INFO", Errno.EIO, "the device's info", null)]
    public void Every_ioctl_on_the_way_may_fail_and_nothing_stays_open(string call, Errno errno, string message, string? hint)
    {
        _host.AddPci(Address);
        _host.Kernel.Failures[call] = errno;
        Expect($"host={Address}", errno, message, "", hint);
    }

    [TestCase(Errno.ENOMEM, "ulimit -l")]
    [TestCase(Errno.ENOSPC, "dma_entry_limit")]
    [TestCase(Errno.EFAULT, "pinned")]
    public void Memory_that_cannot_be_mapped_is_named_and_nothing_stays_mapped(Errno errno, string hint)
    {
        _host.AddPci(Address);
        _host.Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 });
        _host.Kernel.Failures["MAP_DMA"] = errno;
        Expect($"host={Address}", errno, "'ram'", "for DMA", hint);
        Assert.That(_host.Kernel.Mappings, Is.Empty);
    }

    [Test]
    public void Iommufd_on_without_character_device_is_refused()
    {
        _host.AddPci(Address);
        Expect($"host={Address},iommufd=on", Errno.ENODEV, "no character device", Address, "VFIO_DEVICE_CDEV");
    }

    [TestCase("open vfio/devices/vfio0", Errno.ENOENT, "does not exist", "passed in")]
    [TestCase("open vfio/devices/vfio0", Errno.EACCES, "cannot open", "read and write access")]
    [TestCase("open vfio/devices/vfio0", Errno.EBUSY, "in use", "fuser")]
    [TestCase("open iommu", Errno.ENOENT, "does not exist", "modprobe iommufd")]
    [TestCase("open iommu", Errno.EPERM, "cannot open", "read and write access")]
    [TestCase("BIND_IOMMUFD", Errno.EBUSY, "refused to be bound", "open elsewhere")]
    [TestCase("BIND_IOMMUFD", Errno.EINVAL, "refused to be bound", "another open")]
    [TestCase("BIND_IOMMUFD", Errno.EPERM, "refused to be bound", "iommufd=off")]
    [TestCase("IOAS_ALLOC", Errno.ENOMEM, "address space", null)]
    [TestCase("GET_HW_INFO", Errno.EIO, "cannot attach", null)]
    [TestCase("HWPT_ALLOC", Errno.EINVAL, "cannot attach", null)]
    [TestCase("ATTACH_IOMMUFD_PT", Errno.EPERM, "cannot attach", "allow_unsafe_interrupts")]
    [TestCase("IOAS_IOVA_RANGES", Errno.EIO, "cannot attach", null)]
    [TestCase("IOAS_MAP_FILE", Errno.ENOMEM, "for DMA", "ulimit -l")]
    [TestCase("device: GET_INFO", Errno.EIO, "the device's info", null)]
    public void Every_step_of_the_character_device_may_fail_and_nothing_stays_open(string call, Errno errno, string message, string? hint)
    {
        _host.AddPci(Address, cdev: "vfio0");
        _host.Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 });
        _host.Kernel.Failures[call] = errno;
        Expect($"host={Address},iommufd=on", errno, message, "", hint);
        Assert.That(_host.Kernel.Calls.Count(static c => c.Contains("HWPT_ALLOC") || c.Contains("IOAS_ALLOC")),
            Is.EqualTo(_host.Kernel.Calls.Count(static c => c.Contains("DESTROY")) + (call is "HWPT_ALLOC" or "IOAS_ALLOC" ? 1 : 0)), string.Join('\n', _host.Kernel.Calls));
    }

    [Test]
    public void A_stale_node_is_not_taken_for_the_device()
    {
        _host.AddPci(Address, cdev: "vfio0");
        _host.Kernel.CdevNumber = "511:9";
        Expect($"host={Address},iommufd=on", Errno.ENODEV, "is device 511:9", "511:0", "udev");
    }

    [Test]
    public void A_device_left_in_another_state_that_cannot_be_reset_is_refused()
    {
        FakeKernelDevice device = _host.AddPci(Address);
        device.MigState = (uint)VfioDeviceState.PreCopy;
        device.ResetWorks = false;
        Expect($"host={Address}", Errno.EINVAL, "PreCopy", "reset failed", "bind it again");
    }

    private VfioException Expect(string options, Errno errno, string message, string more, string? hint)
    {
        VfioException error = Assert.Throws<VfioException>(() => _host.Open(options))!;
        Assert.Multiple(() =>
        {
            Assert.That(error.Errno, Is.EqualTo(errno), error.Message);
            Assert.That(error.Message, Does.Contain(message).And.Contain(more));
            if (hint is not null) Assert.That(error.Hint, Does.Contain(hint));
            Assert.That(_host.Kernel.OpenCount, Is.Zero, "descriptors stayed open");
            Assert.That(_host.Containers.All, Is.Empty);
        });
        return error;
    }
}
