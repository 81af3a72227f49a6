using Vmm.Devices.Vfio.Probe;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Everything a command touches outside itself, so that tests run commands in process. Results go to Out, the rest to Error.</summary>
internal sealed record CliContext
{
    public required TextWriter Out { get; init; }

    public required TextWriter Error { get; init; }

    /// <summary>Whether Error is a terminal that can redraw a line.</summary>
    public bool ErrorIsTerminal { get; init; }

    /// <summary>Fires on the first Ctrl-C or SIGTERM.</summary>
    public CancellationToken Interrupted { get; init; }

    public Func<string, string?> GetVariable { get; init; } = Environment.GetEnvironmentVariable;

    /// <summary>Opens a VM's QMP socket by path.</summary>
    public Func<string, CancellationToken, Task<IMonitor>> Connect { get; init; } = QmpMonitor.Connect;

    /// <summary>What the host offers to VFIO.</summary>
    public Func<VfioHostReport> ProbeVfioHost { get; init; } = VfioProbe.Host;

    /// <summary>What one device of the host can do.</summary>
    public Func<string, VfioDeviceReport> ProbeVfioDevice { get; init; } = VfioProbe.Device;

    /// <summary>How this process was started: program, and arguments as they came.</summary>
    public IReadOnlyList<string> CommandLine { get; init; } = [];

    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>A line for the user that is not a result.</summary>
    public void Note(string text) => Error.WriteLine($"vmm: {text}");
}
