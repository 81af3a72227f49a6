using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Shell;

/// <summary>A QMP session with one VM, ours or QEMU's. One command at a time.</summary>
internal interface IMonitor : IAsyncDisposable
{
    /// <summary>Runs a command.</summary>
    /// <exception cref="MonitorException">The VM answered an error.</exception>
    /// <exception cref="CliException">The VM went away.</exception>
    Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel);

    /// <summary>Waits until the VM has sent an event since the session began or the last wait ended, or has closed the session.</summary>
    Task WaitForEvent(CancellationToken cancel);

    /// <summary>Waits for the VM to close the session.</summary>
    Task WaitForEnd(TimeSpan deadline);
}
