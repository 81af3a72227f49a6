using Vmm.Migration.Qmp;
using Vmm.Migration.Update;
using Vmm.Tools.Cli.Registry;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>Options for an update of <c>vmm run</c>: the command line of the new process, and the removal of its files after a failure.</summary>
internal static class CommandLineUpdate
{
    private static readonly string[] s_perProcess = ["--incoming", "--replaces"], s_flags = ["--paused", "-S"];

    /// <summary>Builds the options of an update that a QMP client requests, from the command line of this process.</summary>
    internal static UpdateOptions Describe(QmpUpdateRequest request, IReadOnlyList<string> commandLine, VmDirectory directory, VmRegistration registration) => new()
    {
        Binary = request.Binary,
        Method = request.Method,
        Timeout = request.Timeout,
        Arguments = Own(commandLine),
        ChannelArguments = Channels,
        // With these arguments `vmm run` checks all of its options, makes nothing, and exits.
        TrialArguments = ["--device", "help"],
        Directory = directory.DirectoryPath,
        Abandoned = pid =>
        {
            File.Delete(registration.NextPath(pid));
            directory.RemoveLeftovers();
        },
    };

    /// <summary>Returns the arguments without those that concern the start of this process only.</summary>
    internal static IReadOnlyList<string> Own(IReadOnlyList<string> arguments)
    {
        var own = new List<string>();
        for (int i = 0; i < arguments.Count; i++)
        {
            string one = arguments[i];
            if (s_flags.Contains(one))
            {
                // A flag's value may be the next argument.
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
            "--incoming", QmpServer.IncomingUnix("main", channels.Main.Path), "--incoming", QmpServer.IncomingUnix("cpr", channels.Cpr.Path),
            "--replaces", $"{channels.OldPid}",
        ];
}
