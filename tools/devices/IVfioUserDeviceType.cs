using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>A kind of device that can be served by name; <c>vmm device serve --type</c>.</summary>
public interface IVfioUserDeviceType
{
    /// <summary>Name on the command line.</summary>
    string TypeName { get; }

    /// <summary>One line for a list.</summary>
    string Summary { get; }

    /// <summary>Makes a device; reads every option it knows.</summary>
    /// <param name="options">Options.</param>
    /// <returns>The device; the caller's to dispose.</returns>
    /// <exception cref="ConfigurationException">An option is refused.</exception>
    IVfioUserBackend Create(DeviceOptions options);
}
