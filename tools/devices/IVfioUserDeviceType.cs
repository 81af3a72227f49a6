using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>A device type that <c>vmm device serve --type</c> serves by its name.</summary>
public interface IVfioUserDeviceType
{
    /// <summary>Name on the command line.</summary>
    string TypeName { get; }

    /// <summary>One line for <c>vmm device list</c>.</summary>
    string Summary { get; }

    /// <summary>Makes a device. It must read every option that it knows, because unread options are refused.</summary>
    /// <param name="options">The type's name and its options.</param>
    /// <returns>The device, which the caller disposes.</returns>
    /// <exception cref="ConfigurationException">An option is not valid.</exception>
    IVfioUserBackend Create(DeviceOptions options);
}
