using System.Collections;
using System.Text;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// Gives up privileges for good. The kernel keeps them for each thread, and the runtime has threads from its first instruction on, so the program is started
/// again with what is left: the same process, arguments, environment and inherited descriptors. Stateless.
/// </summary>
internal static unsafe class Privileges
{
    /// <summary>Present after the restart, so that a kernel that keeps a privilege all the same does not make the program restart for ever.</summary>
    internal const string RestartedVariable = "VMM_CONFINED";

    private const int PR_CAPBSET_READ = 23, PR_CAPBSET_DROP = 24, PR_SET_NO_NEW_PRIVS = 38, PR_GET_NO_NEW_PRIVS = 39, PR_CAP_AMBIENT = 47, PR_CAP_AMBIENT_CLEAR_ALL = 4;
    private const uint CapabilityVersion3 = 0x20080522;

    /// <summary>Position of each set in the two words that capget(2) fills in for it.</summary>
    private const int Effective = 0, Permitted = 1, Inheritable = 2, Words = 6;

    /// <summary>Whether nothing that this thread executes can gain privileges any more.</summary>
    private static bool HasNoNewPrivileges => LibCExtra.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1;

    /// <summary>
    /// Sets no_new_privs, drops every capability that is not kept, and starts the program again. Returns at once when there is nothing to give up.
    /// </summary>
    /// <param name="kept">Bits of the capabilities to keep if the process has them.</param>
    /// <exception cref="ChannelException">The kernel refused; the process must not go on, because this thread may have given up some already.</exception>
    internal static void Confine(ulong kept)
    {
        bool restarted = Environment.GetEnvironmentVariable(RestartedVariable) is not null;
        if (restarted) Environment.SetEnvironmentVariable(RestartedVariable, null);
        if (restarted || (HasNoNewPrivileges && (Read(Permitted) & ~kept) == 0)) return;
        // Without CAP_SETPCAP the bounding set stays; no_new_privs keeps it from giving anything back.
        for (int i = 0; i < 64; i++)
            if ((kept >> i & 1) == 0 && (Bounding() >> i & 1) != 0) _ = LibCExtra.prctl(PR_CAPBSET_DROP, (nuint)i, 0, 0, 0);
        _ = LibCExtra.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        Keep(kept);
        if (LibCExtra.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) throw Posix.Error("cannot set no_new_privs", Posix.LastError);
        throw Posix.Error("cannot start this program again", Restart());
    }

    private static Errno Restart()
    {
        // /proc/self/exe is this program even if its file has gone, but a process that is started by that name is shown as "exe".
        string program = File.Exists(Environment.ProcessPath) ? Environment.ProcessPath : "/proc/self/exe";
        string[] arguments = Encoding.UTF8.GetString(File.ReadAllBytes("/proc/self/cmdline")).Split('\0')[..^1];
        var environment = new List<string> { $"{RestartedVariable}=1" };
        foreach (DictionaryEntry one in Environment.GetEnvironmentVariables()) environment.Add($"{one.Key}={one.Value}");
        return Posix.Execute(program, arguments, environment);
    }

    private static ulong Bounding()
    {
        ulong all = 0;
        for (int i = 0; i < 64 && LibCExtra.prctl(PR_CAPBSET_READ, (nuint)i, 0, 0, 0) is var has and >= 0; i++) all |= (ulong)has << i;
        return all;
    }

    private static ulong Read(int set)
    {
        uint* data = stackalloc uint[Words];
        Get(data);
        return data[set] | (ulong)data[set + 3] << 32;
    }

    private static void Keep(ulong kept)
    {
        uint* data = stackalloc uint[Words];
        Get(data);
        for (int half = 0; half < 2; half++)
        {
            uint mask = (uint)(kept >> 32 * half);
            data[3 * half + Effective] &= mask;
            data[3 * half + Permitted] &= mask;
            data[3 * half + Inheritable] = 0;
        }
        var header = new LibCExtra.CapabilityHeader { Version = CapabilityVersion3 };
        // SAFETY: the kernel reads six words on this frame.
        if (LibCExtra.capset(ref header, data) != 0) throw Posix.Error("cannot drop capabilities", Posix.LastError);
    }

    private static void Get(uint* data)
    {
        var header = new LibCExtra.CapabilityHeader { Version = CapabilityVersion3 };
        // SAFETY: with this version the kernel writes six words, which is what every caller has on its frame.
        if (LibCExtra.capget(ref header, data) != 0) throw Posix.Error("cannot read capabilities", Posix.LastError);
    }
}
