using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Update;

/// <summary>How a VM moves into the new process.</summary>
public enum UpdateMethod
{
    /// <summary>A second process starts (cpr-transfer). If it fails, the VM continues in this one.</summary>
    Transfer,
    /// <summary>The process replaces itself and keeps its pid (cpr-exec). It cannot go back once the new program has started.</summary>
    Exec,
}

/// <summary>The channels on which the new process receives the VM.</summary>
/// <param name="OldPid">The pid of the process that has the VM now.</param>
/// <param name="Main">The channel of the migration stream: a UNIX socket on which the new process listens, or with exec a file.</param>
/// <param name="Cpr">The UNIX socket on which the new process receives descriptors; null with exec.</param>
public sealed record UpdateChannels(int OldPid, MigrationAddress Main, MigrationAddress? Cpr);

/// <summary>
/// One update. The command line is <see cref="Binary"/>, <see cref="Arguments"/>, then <see cref="ChannelArguments"/>. The new process inherits this
/// one's standard streams, directory and environment; the update adds the variable that <see cref="UpdateArrival.TakeFromEnvironment"/> reads.
/// </summary>
public sealed record UpdateOptions
{
    /// <summary>Path of the new program, or of an assembly (.dll) for <c>dotnet</c>; null for this process's program as it is on disk now.</summary>
    public string? Binary { get; init; }

    /// <summary>Arguments that do not depend on this update.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>Makes the arguments that name the channels. Null for a program that needs none because it uses <see cref="UpdateArrival"/>.</summary>
    public Func<UpdateChannels, IReadOnlyList<string>>? ChannelArguments { get; init; }

    /// <summary>
    /// With exec only: a trial first runs the program as a child with <see cref="Arguments"/> and these. It must prove that it can load a VM
    /// (<see cref="UpdateArrival.IsTrial"/>) and exit with code 0. Null for no trial: a program that cannot take the VM then loses it.
    /// </summary>
    public IReadOnlyList<string>? TrialArguments { get; init; }

    /// <summary>Transfer or exec.</summary>
    public UpdateMethod Method { get; init; }

    /// <summary>Time limit until the new process has the VM, above 0 and at most 2^31 - 1 ms.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromSeconds(30);

    /// <summary>A directory for the sockets, or with exec the file, that only this user can write; null for a temporary one.</summary>
    public string? Directory { get; init; }

    /// <summary>True runs a <see cref="MoveRehearsal"/> while the new process starts, which shortens the pause of the first update.</summary>
    public bool Rehearse { get; init; } = true;

    /// <summary>Called with the pid of a new process that has ended in a failed update, on a pool thread, so that the host can remove its files.</summary>
    public Action<int>? Abandoned { get; init; }

    /// <exception cref="ConfigurationException">A value is out of range.</exception>
    internal void Check()
    {
        if (Timeout <= TimeSpan.Zero || Timeout.TotalMilliseconds > int.MaxValue) throw new ConfigurationException($"update: timeout: expected more than 0 and at most {int.MaxValue} ms, found {Timeout.TotalMilliseconds:0.###} ms");
        if (!Enum.IsDefined(Method)) throw new ConfigurationException($"update: method: expected {UpdateMethod.Transfer} or {UpdateMethod.Exec}, found {(int)Method}");
    }

    /// <summary>Program and arguments of the new process.</summary>
    internal IReadOnlyList<string> Command(UpdateChannels channels) => [.. Program(), .. Arguments, .. ChannelArguments?.Invoke(channels) ?? []];

    /// <summary>Program and arguments of the trial.</summary>
    internal IReadOnlyList<string> TrialCommand() => [.. Program(), .. Arguments, .. TrialArguments ?? []];

    private string[] Program()
    {
        if (Binary is { } binary) return Path.GetExtension(binary) == ".dll" ? ["dotnet", Path.GetFullPath(binary)] : [Path.GetFullPath(binary)];
        string own = Environment.ProcessPath ?? throw new ConfigurationException("update: the path of this process's program is not known");
        return Path.GetFileNameWithoutExtension(own) == "dotnet" ? [own, Environment.GetCommandLineArgs()[0]] : [own];
    }
}
