using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>The device types that can be served by name; a new type needs one more entry.</summary>
public static class DeviceTypes
{
    public static IReadOnlyList<IVfioUserDeviceType> All { get; } = [new DmaTestType(), new GpioType(), new SampleType(), new PciDeviceType<EduPlugin>(new EduDeviceFactory())];
}
