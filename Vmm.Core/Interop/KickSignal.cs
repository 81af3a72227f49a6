using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// A signal that interrupts one system call of one thread and runs no handler: the thread keeps it blocked and lets the kernel unblock it only
/// for the call (KVM_SET_SIGNAL_MASK); what arrives stays pending until it is drained, so none is lost between a check and the call.
/// </summary>
internal static class KickSignal
{
    /// <summary>SIGUSR1: the runtime does not use it, and repeated ones merge, so that no queue overflows.</summary>
    internal static int Number => LibC.SIGUSR1;

    private static ulong Mask => 1UL << (Number - 1);

    /// <summary>Blocks the signal on the calling thread.</summary>
    /// <param name="callMask">Signals to be blocked during the call: those blocked now, without this one.</param>
    /// <returns>The thread's id, for <see cref="Send"/>.</returns>
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
    /// <param name="threadId">From <see cref="Block"/>; the thread must still exist.</param>
    /// <returns>Why it failed.</returns>
    internal static Errno Send(int threadId) => LibCExtra.tgkill(Environment.ProcessId, threadId, Number) == 0 ? Errno.None : Posix.LastError;

    /// <summary>Takes a pending signal off the calling thread.</summary>
    internal static unsafe void Drain()
    {
        sigset_t set = Alone();
        timespec now = default;
        // SAFETY: both structures are on this frame; no siginfo is asked for.
        while (LibC.sigtimedwait(&set, null, &now) >= 0 || Posix.LastError == Errno.EINTR)
        {
            // Standard signals merge, so one round is the rule.
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
