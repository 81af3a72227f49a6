using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

// signal.h and unistd.h
internal static partial class LibC
{
    [LibraryImport(Library)]
    internal static partial int pthread_sigmask(int how, ref readonly SignalSet set, ref SignalSet old);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int sigtimedwait(ref readonly SignalSet set, nint info, ref readonly TimeSpec timeout);

    [LibraryImport(Library)]
    internal static partial int gettid();

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int tgkill(int process, int thread, int signal);

    /// <summary>sigset_t of x86-64 Linux; the kernel looks at the first word only.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 128)]
    internal struct SignalSet
    {
        internal ulong Signals;
    }

    /// <summary>struct timespec.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct TimeSpec
    {
        internal long Seconds;
        internal long Nanoseconds;
    }
}
