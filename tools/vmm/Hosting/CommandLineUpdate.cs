using Vmm.Migration.Qmp;
using Vmm.Migration.Update;
using Vmm.Tools.Cli.Registry;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>What an update of <c>vmm run</c> adds to the library's: the command line of the new process, and what a failed one leaves in the VM directory.</summary>
internal static class CommandLineUpdate
{
    private static readonly string[] s_perProcess = ["--incoming", "--replaces"], s_flags = ["--paused", "-S"];

    /// <summary>An update that a QMP client asks for.</summary>
    /// <param name="request">What the client says.</param>
    /// <param name="commandLine">The arguments of this process.</param>
    /// <param name="directory">Where the sockets go.</param>
    /// <param name="registration">The VM's entry.</param>
    internal static UpdateOptions Describe(QmpUpdateRequest request, IReadOnlyList<string> commandLine, VmDirectory directory, VmRegistration registration) => new()
    {
        Binary = request.Binary,
        Method = request.Method,
        Timeout = request.Timeout,
        Arguments = Own(commandLine),
        ChannelArguments = Channels,
        // With these a `vmm` reads all of its options, makes nothing, and ends.
        TrialArguments = ["--device", "help"],
        Directory = directory.DirectoryPath,
        Abandoned = pid =>
        {
            File.Delete(registration.NextPath(pid));
            directory.RemoveLeftovers();
        },
    };

    /// <summary>The arguments of this process without what concerned its own start.</summary>
    internal static IReadOnlyList<string> Own(IReadOnlyList<string> arguments)
    {
        var own = new List<string>();
        for (int i = 0; i < arguments.Count; i++)
        {
            string one = arguments[i];
            if (s_flags.Contains(one))
            {
                // A flag may have its value beside it.
                if (i + 1 < arguments.Count && bool.TryParse(arguments[i + 1], out _)) i++;
                continue;
            }
            if (s_perProcess.Contains(one)) { i++; continue; }
            if (s_perProcess.Concat(s_flags).Any(p => one.StartsWith(p + "=", StringComparison.Ordinal) || one.StartsWith(p + ":", StringComparison.Ordinal))) continue;
            own.Add(one);
        }
        return own;
    }

    private static IReadOnlyList<string> Channels(UpdateChannels channels) => channels.Cpr is null
        ? ["--incoming", $"file:{channels.Main.Path}"]
        :
        [
            "--incoming", MigrationChannelArgument.Unix("main", channels.Main.Path), "--incoming", MigrationChannelArgument.Unix("cpr", channels.Cpr.Path),
            "--replaces", $"{channels.OldPid}",
        ];
}
