namespace Vmm.Tools.Cli.Shell;

/// <summary>What a run of <c>vmm</c> tells its caller; part of the product's contract and listed in README.md.</summary>
internal enum ExitCode
{
    Ok = 0,
    /// <summary>The operation was tried and failed.</summary>
    Failed = 1,
    /// <summary>The command line is wrong; nothing was tried.</summary>
    Usage = 2,
    /// <summary>The VM said no: a blocker, another migration, or a state that does not allow it.</summary>
    Refused = 3,
    /// <summary>A peer could not be reached: the VM's QMP socket, or the destination of a migration.</summary>
    Unreachable = 4,
    /// <summary>A deadline passed.</summary>
    Timeout = 124,
    /// <summary>Ctrl-C or SIGTERM; what ran was undone.</summary>
    Cancelled = 130,
}
