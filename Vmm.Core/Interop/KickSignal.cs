using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// A signal that interrupts one system call of one thread and runs no handler: the thread keeps it blocked and lets the kernel unblock it only
/// for the call (KVM_SET_SIGNAL_MASK); what arrives stays pending until it is drained, so none is lost between a check and the call.
/// </summary>
internal static class KickSignal
{
    /// <summary>SIGUSR1: the runtime does not use it, and repeated ones merge, so that no queue overflows.</summary>
    internal const int Number = 10;

    private const int SIG_BLOCK = 0;
    private const ulong Mask = 1UL << (Number - 1);

    /// <summary>Blocks the signal on the calling thread.</summary>
    /// <param name="callMask">Signals to be blocked during the call: those blocked now, without this one.</param>
    /// <returns>The thread's id, for <see cref="Send"/>.</returns>
    internal static int Block(out ulong callMask)
    {
        var set = new LibC.SignalSet { Signals = Mask };
        var old = default(LibC.SignalSet);
        int status = LibC.pthread_sigmask(SIG_BLOCK, in set, ref old);
        if (status != 0) throw Posix.Error("pthread_sigmask", (Errno)status);
        callMask = old.Signals & ~Mask;
        return LibC.gettid();
    }

    /// <summary>Makes the signal pending for a thread of this process.</summary>
    /// <param name="threadId">From <see cref="Block"/>; the thread must still exist.</param>
    /// <returns>Why it failed.</returns>
    internal static Errno Send(int threadId) => LibC.tgkill(Environment.ProcessId, threadId, Number) == 0 ? Errno.None : Posix.LastError;

    /// <summary>Takes a pending signal off the calling thread.</summary>
    internal static void Drain()
    {
        var set = new LibC.SignalSet { Signals = Mask };
        var now = default(LibC.TimeSpec);
        while (LibC.sigtimedwait(in set, 0, in now) >= 0 || Posix.LastError == Errno.EINTR)
        {
            // Standard signals merge, so one round is the rule.
        }
    }
}
