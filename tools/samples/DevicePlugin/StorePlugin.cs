using Vmm.Core.Devices;
using Vmm.Core.VmStates;

namespace Vmm.Samples.DevicePlugin;

/// <summary>Registers the device with one word: <c>services.AddVmm().AddMigration().AddStoreDevice()</c>.</summary>
public static class StoreBuilderExtensions
{
    public static VmmBuilder AddStoreDevice(this VmmBuilder builder) => builder.AddPlugin<StorePlugin>();
}

/// <summary>Adds the device type <c>store</c>.</summary>
public sealed class StorePlugin : IVmmPlugin
{
    public void Configure(VmmBuilder builder) => builder.AddDevice<StoreDeviceFactory>();
}

public sealed class StoreDeviceFactory : IDeviceFactory
{
    public string TypeName => "store";

    public string Summary => "a PCI function with memory of its own that it copies into the guest's";

    public IReadOnlyList<IVmStateDescription> Descriptions => [StoreDevice.Description];

    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new StoreDevice(options, services);
}
