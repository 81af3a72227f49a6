namespace Vmm.Tools.Cli.Shell;

/// <summary>Ends a command with an exit code and one line on stderr.</summary>
internal sealed class CliException(ExitCode code, string message, Exception? inner = null) : Exception(message, inner)
{
    public ExitCode Code { get; } = code;

    /// <summary>What the user can do about the error, or null.</summary>
    public string? Hint { get; init; }

    public static CliException Usage(string message, string? hint = null) => new(ExitCode.Usage, message) { Hint = hint };

    public static CliException Unreachable(string message, string? hint = null, Exception? inner = null) =>
        new(ExitCode.Unreachable, message, inner) { Hint = hint };
}
