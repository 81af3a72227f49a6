namespace Vmm.Core.Errors;

/// <summary>A VFIO device, container or group refused a request, or its state machine an arc.</summary>
/// <param name="message">Device first, then the request and what the answer means; says so when the device was reset.</param>
/// <param name="errno">The errno of the kernel or of the vfio-user server.</param>
/// <param name="inner">The cause, if any.</param>
public sealed class VfioException(string message, Errno errno, Exception? inner = null) : VmmException(message, inner, errno);

/// <summary>A vfio-user peer sent a message that breaks the protocol. A server answers the errno; a client closes the connection.</summary>
/// <param name="message">Command, offset, expected and found.</param>
/// <param name="errno">What a server answers; EINVAL unless the protocol names another.</param>
/// <param name="inner">The cause, if any.</param>
public sealed class VfioUserProtocolException(string message, Errno errno = Errno.EINVAL, Exception? inner = null) : VmmException(message, inner, errno);
