using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Probe;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>Tests against this machine's own kernel, as far as they need no VFIO device.</summary>
internal sealed class KernelHostTests
{
    [Test]
    public void This_machines_nodes_give_the_error_that_fits_them()
    {
        // No machine has a group with this number.
        using var host = new FakeVfioHost(new KernelVfio(), dev: "/dev");
        host.AddPci("0000:00:01.0", group: "987654");
        VfioException error = Assert.Throws<VfioException>(() => host.Open("host=0000:00:01.0,iommufd=off"))!;
        string expected = !File.Exists("/dev/vfio/vfio") ? "/dev/vfio/vfio does not exist" : error.Errno is Errno.EACCES or Errno.EPERM ? "cannot open /dev/vfio/" : "/dev/vfio/987654 does not exist";
        Assert.That(error.Message, Does.Contain(expected));
        Assert.That(error.Hint, Is.Not.Null.And.Not.Empty);
        TestContext.Out.WriteLine($"{error.Message} ({error.Hint})");
    }

    [Test]
    public void A_device_of_this_machine_that_is_not_vfios_is_refused_by_name()
    {
        var paths = new VfioHostPaths();
        string? name = (Directory.Exists(paths.PciDevices) ? Directory.EnumerateDirectories(paths.PciDevices) : [])
            .Where(static d => !VfioHostDevice.Read(d).HasVfioDriver).Select(Path.GetFileName).FirstOrDefault();
        if (name is null) Assert.Ignore("this machine shows no PCI device, or all of them are VFIO's");
        VfioException error = Assert.Throws<VfioException>(() => VfioProbe.Device(name!))!;
        Assert.That(error.Message, Does.StartWith(name).And.Contain("vfio-pci is needed"));
    }

    [Test]
    public void A_device_that_this_machine_lacks_is_named() =>
        Assert.That(() => VfioProbe.Device("ffff:ff:1f.7"), Throws.TypeOf<VfioException>().With.Message.Contains("ffff:ff:1f.7: no such device"));

    [Test]
    public void This_machine_can_be_listed() => Assert.That(VfioProbe.Host().HasContainerNode, Is.EqualTo(File.Exists("/dev/vfio/vfio")));

    [Test]
    public void The_real_calls_do_what_their_names_say()
    {
        var kernel = new KernelVfio();
        Assert.That((kernel.Open("/dev/does-not-exist", out Errno errno), errno), Is.EqualTo(((OwnedFd?)null, Errno.ENOENT)));
        using OwnedFd zero = kernel.Open("/dev/zero", out errno)!;
        Assert.That((kernel.DeviceNumber(zero, out string number), number), Is.EqualTo((Errno.None, "1:5")));
        Assert.That((kernel.Ioctl(zero, 0x3b64, 0, out errno), errno), Is.EqualTo((-1, Errno.ENOTTY)));
        Assert.That((kernel.Ioctl(zero, 0x3b6b, new byte[24], out errno), errno), Is.EqualTo((-1, Errno.ENOTTY)));
        Assert.That((kernel.Ioctl(zero, 0x3b75, new byte[48], 40, new byte[8], out errno), errno), Is.EqualTo((-1, Errno.ENOTTY)));
        Assert.That((kernel.Read(zero, new byte[3], out errno), kernel.Write(zero, new byte[4], out errno)), Is.EqualTo((3, 4)));

        using OwnedFd file = Posix.MemFd("vfio-test");
        Assert.That((kernel.PWrite(file, [1, 2, 3], 4096, out errno), kernel.PRead(file, new byte[8], 4097, out errno)), Is.EqualTo((3, 2)));
        Posix.Truncate(file, 8192);
        using MappedRegion map = kernel.Map(file, 4096, 4096, "test", writable: false);
        Assert.That(map.Slice(0, 3).ToArray(), Is.EqualTo(new byte[] { 1, 2, 3 }));
        Assert.That(() => kernel.Map(zero, 4096, 1, "test", writable: true), Throws.TypeOf<ChannelException>());
    }
}
