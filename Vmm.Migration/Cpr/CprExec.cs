using System.Collections;
using System.Globalization;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Cpr;

/// <summary>
/// Mode cpr-exec (vfio-migration 7.3; QEMU: <c>cpr_exec_cb</c>, <c>cpr_exec_input</c>): the process replaces itself. The descriptors stay open
/// over the exec, and a memfd, whose number is in the environment, says which is which.
/// </summary>
public static class CprExec
{
    /// <summary>Environment variable with the number of the memfd (QEMU: <c>CPR_EXEC_STATE_NAME</c>).</summary>
    public const string StateVariable = "QEMU_CPR_EXEC_STATE";

    /// <summary>Takes what this process had before it replaced itself, and forgets the variable.</summary>
    /// <returns>Null when it did not.</returns>
    /// <exception cref="VmmException">The variable does not name a CPR state.</exception>
    public static CprIncoming? TakeFromEnvironment()
    {
        string? text = Environment.GetEnvironmentVariable(StateVariable);
        if (text is null) return null;
        Environment.SetEnvironmentVariable(StateVariable, null);
        if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int number) || !Posix.IsOpen(number))
            throw new ConfigurationException($"{StateVariable}='{text}' is not an open descriptor");
        using var memory = new OwnedFd(number);
        Posix.Stat(memory, out FileStatus stat);
        if (stat.SizeBytes is <= 0 or > WireLimits.CprStateBytes)
            throw new StreamLimitException($"CPR state: {stat.SizeBytes} bytes, at most {WireLimits.CprStateBytes} are taken (WireLimits.CprStateBytes)");
        byte[] bytes = new byte[stat.SizeBytes];
        if (Posix.PRead(memory, bytes, 0, out Errno errno) != bytes.Length) throw Posix.Error("CPR state", errno);
        var claimed = new Dictionary<int, OwnedFd>();
        return CprState.Parse(bytes, MigrationMode.CprExec, n => n == number ? null : Claim(n, claimed));
    }

    /// <summary>
    /// One owner a number: under a second name, as of a container that two groups are in, it is a duplicate. Close-on-exec again.
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

    /// <summary>Replaces the process. Does not return; on failure everything is as before.</summary>
    /// <param name="table">Descriptors to keep.</param>
    /// <param name="command">Program and arguments.</param>
    /// <exception cref="ChannelException">The program cannot be run.</exception>
    internal static void Replace(CprFdTable table, IReadOnlyList<string> command)
    {
        IReadOnlyList<CprFd> fds = table.Entries();
        byte[] state = CprState.ToBytes(fds, table.Devices());
        using OwnedFd memory = Posix.MemFd(StateVariable, state.Length);
        if (Posix.PWrite(memory, state, 0, out Errno errno) != state.Length) throw Posix.Error("CPR state", errno);
        var environment = new List<string>();
        foreach (DictionaryEntry one in Environment.GetEnvironmentVariables())
            if ((string)one.Key != StateVariable) environment.Add($"{one.Key}={one.Value}");
        environment.Add($"{StateVariable}={memory.Number}");
        OwnedFd[] kept = [memory, .. fds.Select(static f => f.Fd)];
        // Not earlier: other children that this process starts must not inherit them.
        foreach (OwnedFd fd in kept) Posix.SetCloseOnExec(fd, false);
        errno = Posix.Execute(command, environment);
        foreach (OwnedFd fd in kept) Posix.SetCloseOnExec(fd, true);
        throw new ChannelException($"execvp {command[0]} failed: {Posix.Describe(errno)}", errno);
    }
}
