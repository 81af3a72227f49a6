namespace Vmm.Core.Errors;

/// <summary>KVM refused a request, or a vCPU stopped for good.</summary>
/// <param name="message">The request and the object, then what the kernel answered.</param>
/// <param name="errno">The errno of the kernel.</param>
/// <param name="inner">The cause, if any.</param>
public sealed class KvmException(string message, Errno errno, Exception? inner = null) : VmmException(message, inner, errno);
