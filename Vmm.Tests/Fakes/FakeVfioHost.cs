using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Support;

namespace Vmm.Tests.Fakes;

/// <summary>A host with VFIO devices: a temp folder shaped like sysfs and /dev, the fake kernel that serves its nodes, and one VM.</summary>
internal sealed class FakeVfioHost : IDisposable
{
    private readonly TempDirectory _root = new();
    private readonly ServiceProvider _scope;

    internal FakeVfioHost(IVfioKernel? kernel = null, string? dev = null)
    {
        Paths = new VfioHostPaths { Sysfs = _root["sys"], Dev = dev ?? _root["dev"] };
        foreach (string folder in new[] { Paths.PciDevices, Paths.MediatedDevices, Paths.Groups, Path.Combine(_root["dev"], "vfio", "devices") }) Directory.CreateDirectory(folder);
        Kernel.Root = _root["dev"] + "/";
        var services = new ServiceCollection();
        services.AddSingleton(kernel ?? Kernel).AddSingleton(Paths).AddSingleton(_ => Services!.Memory).AddSingleton<ILoggerFactory>(NullLoggerFactory.Instance).AddScoped<VfioContainers>();
        _scope = services.BuildServiceProvider();
        Services = new TestServices { Scope = _scope };
    }

    internal VfioHostPaths Paths { get; }

    internal FakeVfioKernel Kernel { get; } = new();

    internal TestServices Services { get; }

    internal GuestMemory Memory => Services.Memory;

    internal VfioContainers Containers => _scope.GetRequiredService<VfioContainers>();

    /// <summary>Creates the node of a container, of iommufd or of anything else below /dev.</summary>
    internal void AddNode(string path) => File.WriteAllBytes(path, []);

    /// <summary>Adds a PCI function; with <paramref name="cdev"/> it also has a character device, number 511:0.</summary>
    internal FakeKernelDevice AddPci(string name, string? driver = "vfio-pci", string? group = "7", string? cdev = null) =>
        AddDevice(Path.Combine(_root["sys"], "devices", name), Paths.PciDevices, "pci", name, driver, group, cdev);

    /// <summary>Adds a mediated device.</summary>
    internal FakeKernelDevice AddMediated(string uuid, string group, string? cdev = null) =>
        AddDevice(Path.Combine(_root["sys"], "devices", "virtual", uuid), Paths.MediatedDevices, "mdev", uuid, "vfio_mdev", group, cdev);

    /// <summary>Opens a device by options such as <c>host=0000:00:01.0,iommufd=on</c>.</summary>
    internal KernelVfioDeviceIo Open(string options) => KernelVfioDeviceIo.Open(DeviceOptions.Parse($"vfio-pci,{options}"), Services);

    public void Dispose()
    {
        _scope.Dispose();
        Services.Dispose();
        _root.Dispose();
    }

    private FakeKernelDevice AddDevice(string folder, string bus, string subsystem, string name, string? driver, string? group, string? cdev)
    {
        Directory.CreateDirectory(folder);
        File.CreateSymbolicLink(Path.Combine(bus, name), folder);
        Link(Path.Combine(folder, "subsystem"), Path.Combine(_root["sys"], "bus", subsystem));
        if (driver is not null) Link(Path.Combine(folder, "driver"), Path.Combine(_root["sys"], "bus", subsystem, "drivers", driver));
        if (group is not null)
        {
            string members = Path.Combine(Paths.Groups, group, "devices");
            Directory.CreateDirectory(members);
            File.CreateSymbolicLink(Path.Combine(members, name), folder);
            Link(Path.Combine(folder, "iommu_group"), Path.Combine(Paths.Groups, group));
        }
        var device = new FakeKernelDevice(name) { IsMediated = subsystem == "mdev" };
        Kernel.Devices.Add(device);
        if (group is not null) device.Group = group;
        if (cdev is null) return device;
        Directory.CreateDirectory(Path.Combine(folder, "vfio-dev", cdev));
        File.WriteAllText(Path.Combine(folder, "vfio-dev", cdev, "dev"), "511:0\n");
        device.Cdev = cdev;
        return device;
    }

    private static void Link(string link, string target)
    {
        Directory.CreateDirectory(target);
        File.CreateSymbolicLink(link, target);
    }
}
