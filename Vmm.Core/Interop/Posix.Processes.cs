using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

public static partial class Posix
{
    private const int SYS_pidfd_open = 434;

    /// <summary>A descriptor of a process (<c>pidfd_open</c>), readable once the process has ended.</summary>
    /// <returns>The descriptor, or null with ESRCH when there is no such process.</returns>
    internal static OwnedFd? OpenProcess(int pid, out Errno errno)
    {
        int number = SystemCall(SYS_pidfd_open, pid, 0, 0);
        errno = number < 0 ? LastError : Errno.None;
        return number < 0 ? null : new OwnedFd(number);
    }
}
