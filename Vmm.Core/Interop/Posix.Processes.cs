using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

public static partial class Posix
{
    private const int SYS_pidfd_open = 434;

    // CAP_DAC_OVERRIDE: files of others that the user names. CAP_NET_BIND_SERVICE: a port below 1024. CAP_NET_ADMIN: send buffers over the system's limit.
    // CAP_IPC_LOCK: RAM that a device may access stays in memory. CAP_SYS_NICE: a vCPU that must stop gets its turn.
    private const ulong KeptCapabilities = 1ul << 1 | 1ul << 10 | 1ul << 12 | 1ul << 14 | 1ul << 23;

    /// <summary>
    /// Gives up for good, for this process and its children, what a VM monitor does not need: gaining privileges by executing a program (no_new_privs), and
    /// all capabilities but five (docs/security.md). Call it first in the program: if there is something to give up, the program starts again with the same
    /// pid, arguments, environment and inherited descriptors. Descriptors that are open already keep working.
    /// </summary>
    /// <exception cref="ChannelException">The kernel refused. The process must end.</exception>
    public static void Confine() => Privileges.Confine(KeptCapabilities);

    /// <summary>Opens a descriptor of a process, which becomes readable when the process ends (<c>pidfd_open</c>).</summary>
    /// <returns>The descriptor; null with ESRCH if there is no such process.</returns>
    internal static OwnedFd? OpenProcess(int pid, out Errno errno)
    {
        int number = SystemCall(SYS_pidfd_open, pid, 0, 0);
        errno = number < 0 ? LastError : Errno.None;
        return number < 0 ? null : new OwnedFd(number);
    }
}
