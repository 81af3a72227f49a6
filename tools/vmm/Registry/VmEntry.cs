using System.Globalization;

namespace Vmm.Tools.Cli.Registry;

/// <summary>One VM of this user as <see cref="VmDirectory"/> keeps it.</summary>
internal sealed record VmEntry
{
    public required int Pid { get; init; }

    /// <summary>Start time of the process, in clock ticks since boot, which distinguishes it from a later process with the same pid.</summary>
    public required long StartTicks { get; init; }

    public string? Name { get; init; }

    public required string QmpPath { get; init; }

    public long MemoryBytes { get; init; }

    /// <summary>CLOCK_MONOTONIC, ns: when a VM that came from another process started in this one.</summary>
    public long RunningAtNs { get; init; }

    /// <summary>How long the VM was stopped while its process replaced itself, ms.</summary>
    public double PauseMs { get; init; }

    /// <summary>The name, or the pid of a VM without a name.</summary>
    public string Key => Name ?? Pid.ToString(CultureInfo.InvariantCulture);

    /// <summary>Field 22 of /proc/PID/stat, or null when there is no such process.</summary>
    public static long? ReadStartTicks(int pid)
    {
        try
        {
            string stat = File.ReadAllText($"/proc/{pid}/stat");
            // Field 2, the command name, may contain blanks, so split after its closing parenthesis.
            string[] fields = stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
            return fields[0] is "Z" or "X" ? null : long.Parse(fields[19], CultureInfo.InvariantCulture);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}
