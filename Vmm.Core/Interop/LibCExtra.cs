using System.Runtime.InteropServices;
using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>
/// C library functions that Tmds.LibC lacks, or declares in a form that this product cannot use. All others come from Tmds.LibC. <see cref="Posix"/> has
/// wrappers that retry EINTR.
/// </summary>
internal static unsafe partial class LibCExtra
{
    private const string Library = "libc";

    // Tmds.LibC does not declare these.

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint writev(OwnedFd fd, iovec* iov, int count);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint pwritev(OwnedFd fd, iovec* iov, int count, long offset);

    /// <summary>Returns only if it fails. Both lists end with a null.</summary>
    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int execvpe(string file, [In] string?[] argv, [In] string?[] envp);

    [LibraryImport(Library, SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int renameat2(int fromDirectory, string from, int toDirectory, string to, uint flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int flock(OwnedFd fd, int operation);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int prctl(int option, nuint a, nuint b, nuint c, nuint d);

    /// <summary>Both capability calls take the header and two words of each set (struct __user_cap_data_struct[2]).</summary>
    [LibraryImport(Library, SetLastError = true)]
    internal static partial int capget(ref CapabilityHeader header, uint* data);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int capset(ref CapabilityHeader header, uint* data);

    [LibraryImport(Library)]
    internal static partial int gettid();

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int tgkill(int process, int thread, int signal);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int sched_setscheduler(int threadId, int policy, ref readonly SchedParam param);

    // Tmds.LibC's poll does not keep errno, so a caller could not tell EINTR from other failures.

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int poll(pollfd* fds, nuint count, int timeoutMs);

    // These run once per buffer or per vCPU exit, and a call through Tmds.LibC costs about 20 ns more than one through generated code.

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint sendmsg(OwnedFd fd, msghdr* message, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint recvmsg(OwnedFd fd, msghdr* message, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial nint recv(OwnedFd fd, byte* buffer, nuint count, int flags);

    [LibraryImport(Library, SetLastError = true)]
    internal static partial int ioctl(OwnedFd fd, nuint request, nint argument);

    /// <summary>struct __user_cap_header_struct.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct CapabilityHeader
    {
        internal uint Version;
        internal int ThreadId;
    }

    /// <summary>struct sched_param.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct SchedParam
    {
        internal int Priority;
    }
}
