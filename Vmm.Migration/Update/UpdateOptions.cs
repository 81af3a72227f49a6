using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Update;

/// <summary>How a VM gets into the new process.</summary>
public enum UpdateMethod
{
    /// <summary>Another process starts beside this one (cpr-transfer). If it does not come up, the VM goes on here.</summary>
    Transfer,
    /// <summary>The process replaces itself and keeps its pid (cpr-exec). Once the new program has begun, there is no way back.</summary>
    Exec,
}

/// <summary>Where the new process finds the VM.</summary>
/// <param name="OldPid">The process that has the VM now.</param>
/// <param name="Main">The migration stream: a UNIX socket on which the new process listens, or with exec a file.</param>
/// <param name="Cpr">The UNIX socket on which the new process takes descriptors; null with exec.</param>
public sealed record UpdateChannels(int OldPid, MigrationAddress Main, MigrationAddress? Cpr);

/// <summary>
/// One update. The command line is <see cref="Binary"/>, <see cref="Arguments"/>, then <see cref="ChannelArguments"/>. The new process has this one's
/// streams, directory and environment, and in the environment what <see cref="UpdateArrival.TakeFromEnvironment"/> reads.
/// </summary>
public sealed record UpdateOptions
{
    /// <summary>Path of the new program, or of an assembly (.dll) for <c>dotnet</c>; null for the program that runs here, as it is on disk now.</summary>
    public string? Binary { get; init; }

    /// <summary>Arguments that do not depend on this update.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>Arguments made from the channels, for a program whose command line names them; null for one that uses <see cref="UpdateArrival"/> alone.</summary>
    public Func<UpdateChannels, IReadOnlyList<string>>? ChannelArguments { get; init; }

    /// <summary>
    /// With exec only: the program is first run with <see cref="Arguments"/> and these, as a child, and must exit with code 0. Null for no trial.
    /// </summary>
    public IReadOnlyList<string>? TrialArguments { get; init; }

    /// <summary>Transfer or exec.</summary>
    public UpdateMethod Method { get; init; }

    /// <summary>How long the new process may take until it has the VM.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromSeconds(30);

    /// <summary>A directory of this user alone for the sockets, or with exec the file; null for a temporary one.</summary>
    public string? Directory { get; init; }

    /// <summary>Whether a <see cref="MoveRehearsal"/> runs while the new process starts, which shortens the pause of the first update.</summary>
    public bool Rehearse { get; init; } = true;

    /// <summary>Called with the pid of a process that was ended because the update failed, to remove what it may have left.</summary>
    public Action<int>? Abandoned { get; init; }

    /// <exception cref="ConfigurationException">A value is out of range.</exception>
    internal void Check()
    {
        if (Timeout <= TimeSpan.Zero || Timeout.TotalMilliseconds > int.MaxValue) throw new ConfigurationException($"update: timeout {Timeout} is not between 0 and {int.MaxValue} ms");
        if (!Enum.IsDefined(Method)) throw new ConfigurationException($"update: method {Method} is not known");
    }

    /// <summary>Program and arguments.</summary>
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
