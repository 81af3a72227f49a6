using System.Collections;
using System.Globalization;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Cpr;

/// <summary>
/// Mode cpr-exec (vfio-migration 7.3; QEMU: <c>cpr_exec_cb</c>, <c>cpr_exec_input</c>): the process replaces itself by execve. Descriptors stay open
/// over the exec. A memfd, whose number is in the environment, lists them by name.
/// </summary>
internal static class CprExec
{
    /// <summary>Environment variable with the number of the memfd (QEMU: <c>CPR_EXEC_STATE_NAME</c>).</summary>
    public const string StateVariable = "QEMU_CPR_EXEC_STATE";

    /// <summary>Takes the descriptors that this process kept when it replaced itself, and removes the variable.</summary>
    /// <returns>The descriptors; null if the process did not replace itself.</returns>
    /// <exception cref="VmmException">The variable does not name a CPR state.</exception>
    public static CprIncoming? TakeFromEnvironment()
    {
        string? text = Environment.GetEnvironmentVariable(StateVariable);
        if (text is null) return null;
        Environment.SetEnvironmentVariable(StateVariable, null);
        if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int number) || !Posix.IsOpen(number))
            throw new ConfigurationException($"environment variable {StateVariable}: expected the number of an open descriptor, found '{text}'");
        using var memory = new OwnedFd(number);
        Posix.Stat(memory, out FileStatus stat);
        if (stat.SizeBytes is <= 0 or > WireLimits.CprStateBytes)
            throw new StreamLimitException($"CPR state in descriptor {number}: expected 1 to {WireLimits.CprStateBytes} bytes (WireLimits.CprStateBytes), found {stat.SizeBytes}");
        byte[] bytes = new byte[stat.SizeBytes];
        int n = Posix.PRead(memory, bytes, 0, out Errno errno);
        if (n < 0) throw Posix.Error($"cannot read the CPR state in descriptor {number}", errno);
        if (n < bytes.Length) throw new StreamTruncatedException($"CPR state in descriptor {number}: expected {bytes.Length} bytes, found {n}") { Offset = n };
        var claimed = new Dictionary<int, OwnedFd>();
        return CprState.Parse(bytes, MigrationMode.CprExec, n => n == number ? null : Claim(n, claimed));
    }

    /// <summary>
    /// Takes ownership of a descriptor and sets close-on-exec again. A number that the state lists twice, such as a container of two groups, gets a
    /// duplicate the second time, because each number must have one owner.
    /// </summary>
    internal static OwnedFd? Claim(int number, Dictionary<int, OwnedFd> claimed)
    {
        if (claimed.TryGetValue(number, out OwnedFd? owned)) return Posix.Duplicate(owned);
        if (!Posix.IsOpen(number)) return null;
        var fd = new OwnedFd(number);
        Posix.SetCloseOnExec(fd, true);
        claimed.Add(number, fd);
        return fd;
    }

    /// <summary>Replaces the process by a program and its arguments. Returns only by an exception, which leaves everything unchanged.</summary>
    /// <exception cref="ChannelException">The program cannot be run.</exception>
    internal static void Replace(CprFdTable table, IReadOnlyList<string> command)
    {
        IReadOnlyList<CprFd> fds = table.Entries();
        byte[] state = CprState.ToBytes(fds, []);
        using OwnedFd memory = Posix.MemFd(StateVariable, state.Length);
        if (Posix.PWrite(memory, state, 0, out Errno errno) != state.Length) throw Posix.Error($"cannot write the {state.Length} bytes of the CPR state into a memfd", errno);
        var environment = new List<string>();
        foreach (DictionaryEntry one in Environment.GetEnvironmentVariables())
            if ((string)one.Key != StateVariable) environment.Add($"{one.Key}={one.Value}");
        environment.Add($"{StateVariable}={memory.Number}");
        OwnedFd[] kept = [memory, .. fds.Select(static f => f.Fd)];
        // As late as possible, because other children of this process must not inherit the descriptors.
        foreach (OwnedFd fd in kept) Posix.SetCloseOnExec(fd, false);
        errno = Posix.Execute(command, environment);
        foreach (OwnedFd fd in kept) Posix.SetCloseOnExec(fd, true);
        throw new ChannelException($"execvp {command[0]} failed: {Posix.Describe(errno)}", errno);
    }
}
