using System.Runtime.InteropServices;

namespace Vmm.Core.Interop;

// sched.h
internal static partial class LibC
{
    [LibraryImport(Library, SetLastError = true)]
    internal static partial int sched_setscheduler(int threadId, int policy, ref readonly SchedParam param);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int sched_getscheduler(int threadId);

    /// <summary>struct sched_param.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct SchedParam
    {
        internal int Priority;
    }
}
