namespace Vmm.Core.Errors;

/// <summary>KVM refused a request, or a vCPU stopped and cannot go on.</summary>
/// <param name="message">The request and the object, then the kernel's answer.</param>
/// <param name="errno">The errno of the kernel.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class KvmException(string message, Errno errno, Exception? inner = null) : VmmException(message, inner, errno);
