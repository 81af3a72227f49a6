using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>A VFIO device, container or group refused a request, or its state machine an arc.</summary>
/// <param name="message">Names the device, then the request and the answer; says so when the device was reset.</param>
/// <param name="errno">The errno of the kernel or of the vfio-user server.</param>
/// <param name="inner">The cause, if any.</param>
public sealed class VfioException(string message, Errno errno, Exception? inner = null) : VmmException(message, inner, errno);
