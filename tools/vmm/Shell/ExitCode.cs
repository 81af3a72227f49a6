namespace Vmm.Tools.Cli.Shell;

/// <summary>The exit codes of <c>vmm</c>, which users may rely on; README.md lists them.</summary>
internal enum ExitCode
{
    Ok = 0,
    /// <summary>The operation started and failed.</summary>
    Failed = 1,
    /// <summary>The command line is wrong; nothing was started.</summary>
    Usage = 2,
    /// <summary>The VM refused: a blocker, another migration, or a state that does not allow the operation.</summary>
    Refused = 3,
    /// <summary>A peer could not be reached: the VM's QMP socket, or the destination of a migration.</summary>
    Unreachable = 4,
    /// <summary>A deadline passed.</summary>
    Timeout = 124,
    /// <summary>Ctrl-C or SIGTERM came; the operation was undone.</summary>
    Cancelled = 130,
}
