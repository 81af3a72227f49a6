using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

internal static partial class Posix
{
    private const int F_ADD_SEALS = 1033, F_SEAL_SHRINK = 2;
    private const uint MFD_CLOEXEC = 1, MFD_ALLOW_SEALING = 2;

    /// <summary>Makes a memfd of zeros that nobody can shrink: a mapping of it never faults.</summary>
    internal static OwnedFd MemFd(string name, long lengthBytes)
    {
        OwnedFd fd = LibC.memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd.IsInvalid) throw Error($"memfd '{name}'", LastError);
        Errno errno = Truncate(fd, lengthBytes);
        if (errno == Errno.None && LibC.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0) errno = LastError;
        if (errno == Errno.None) return fd;
        fd.Dispose();
        throw Error($"memfd '{name}' of {lengthBytes} bytes", errno);
    }
}
