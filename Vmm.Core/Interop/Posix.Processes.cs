using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

public static partial class Posix
{
    private const int SYS_pidfd_open = 434;

    /// <summary>Opens a descriptor of a process, which becomes readable when the process ends (<c>pidfd_open</c>).</summary>
    /// <returns>The descriptor; null with ESRCH if there is no such process.</returns>
    internal static OwnedFd? OpenProcess(int pid, out Errno errno)
    {
        int number = SystemCall(SYS_pidfd_open, pid, 0, 0);
        errno = number < 0 ? LastError : Errno.None;
        return number < 0 ? null : new OwnedFd(number);
    }
}
