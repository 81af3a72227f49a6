using Vmm.Devices.Vfio.Probe;

namespace Vmm.Tools.Cli.Shell;

/// <summary>The environment of a command; tests replace it to run commands in process. Results go to Out, everything else to Error.</summary>
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

    /// <summary>Probes the VFIO support of the host.</summary>
    public Func<VfioHostReport> ProbeVfioHost { get; init; } = VfioProbe.Host;

    /// <summary>Probes one device of the host.</summary>
    public Func<string, VfioDeviceReport> ProbeVfioDevice { get; init; } = VfioProbe.Device;

    /// <summary>The unchanged command line of this process: program and arguments.</summary>
    public IReadOnlyList<string> CommandLine { get; init; } = [];

    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>Writes a line for the user that is no result.</summary>
    public void Note(string text) => Error.WriteLine($"vmm: {text}");
}
