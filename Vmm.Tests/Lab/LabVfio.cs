using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Tests.Lab;

/// <summary>Opens the lab's devices for one VM, of which it has the RAM and the containers.</summary>
internal sealed class LabVfio : IDisposable
{
    internal const string Mtty1 = "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", Mtty2 = "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";

    private readonly List<IVfioDeviceIo> _devices = [];

    internal LabVfio(ulong ramBytes = 1 << 20)
    {
        Ram = Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = ramBytes });
        Containers = new VfioContainers(Memory, new KernelVfio(), Paths, NullLoggerFactory.Instance);
    }

    internal static VfioHostPaths Paths { get; } = new();

    internal static string Edu => Pci("0x1234", "0x11e8");

    internal static string E1000e => Pci("0x8086", "0x10d3");

    internal GuestMemory Memory { get; } = new();

    internal RamBlock Ram { get; }

    internal VfioContainers Containers { get; }

    internal KernelVfioDeviceIo Open(string path, bool iommufd)
    {
        KernelVfioDeviceIo device = Containers.Open(new VfioDeviceChoice(path, iommufd));
        _devices.Add(device);
        return device;
    }

    public void Dispose()
    {
        foreach (IVfioDeviceIo device in _devices) device.Dispose();
        Containers.Dispose();
        Memory.Dispose();
    }

    private static string Pci(string vendor, string device) => Directory.GetDirectories(Paths.PciDevices)
        .Single(d => File.ReadAllText(Path.Combine(d, "vendor")).Trim() == vendor && File.ReadAllText(Path.Combine(d, "device")).Trim() == device);
}
