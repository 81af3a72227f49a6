using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// A signal that interrupts one system call of one thread and has no handler. The thread blocks the signal, and the kernel unblocks it only during
/// the call (KVM_SET_SIGNAL_MASK). A signal stays pending until it is drained, so one that arrives between a check and the call is not lost.
/// </summary>
internal static class KickSignal
{
    /// <summary>SIGUSR1: the runtime does not use it, and it is a standard signal, so that repeated ones merge and no queue overflows.</summary>
    internal static int Number => LibC.SIGUSR1;

    private static ulong Mask => 1UL << (Number - 1);

    /// <summary>Blocks the signal on the calling thread.</summary>
    /// <param name="callMask">Signals to block during the call: those that the thread blocked before.</param>
    /// <returns>The kernel's id of the thread, for <see cref="Send"/>.</returns>
    internal static unsafe int Block(out ulong callMask)
    {
        sigset_t set = Alone(), old;
        // SAFETY: both sets are on this frame; the kernel's 64 signals are the first word of one.
        int status = LibC.pthread_sigmask(LibC.SIG_BLOCK, &set, &old);
        if (status != 0) throw Posix.Error("pthread_sigmask", (Errno)status);
        callMask = *(ulong*)&old & ~Mask;
        return Posix.ThreadId;
    }

    /// <summary>Makes the signal pending for a thread of this process.</summary>
    /// <param name="threadId">Result of <see cref="Block"/>; the thread must still exist.</param>
    internal static Errno Send(int threadId) => LibCExtra.tgkill(Environment.ProcessId, threadId, Number) == 0 ? Errno.None : Posix.LastError;

    /// <summary>Removes the pending signal from the calling thread.</summary>
    internal static unsafe void Drain()
    {
        sigset_t set = Alone();
        timespec now = default;
        // SAFETY: both structures are on this frame; no siginfo is asked for.
        while (LibC.sigtimedwait(&set, null, &now) >= 0 || Posix.LastError == Errno.EINTR)
        {
            // Pending standard signals merge, so this loop usually runs once.
        }
    }

    private static unsafe sigset_t Alone()
    {
        sigset_t set;
        // SAFETY: the set is on this frame.
        _ = LibC.sigemptyset(&set);
        _ = LibC.sigaddset(&set, Number);
        return set;
    }
}
