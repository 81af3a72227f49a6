using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>A vfio-user peer sent a message that breaks the protocol. A server answers the errno; a client closes the connection.</summary>
/// <param name="message">Names the command, and what was expected and found.</param>
/// <param name="errno">What a server answers; EINVAL unless the protocol names another.</param>
/// <param name="inner">The cause, if any.</param>
internal sealed class VfioUserProtocolException(string message, Errno errno = Errno.EINVAL, Exception? inner = null) : VmmException(message, inner, errno);
