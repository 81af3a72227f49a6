using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Shell;

/// <summary>A QMP session with one VM of vmm or QEMU, for one command at a time.</summary>
internal interface IMonitor : IAsyncDisposable
{
    /// <summary>Runs a command.</summary>
    /// <exception cref="MonitorException">The VM answered with an error.</exception>
    /// <exception cref="CliException">The connection ended, or the VM did not answer in time.</exception>
    Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel);

    /// <summary>Waits until the VM has sent an event since the session began or the last wait ended, or has closed the session.</summary>
    Task WaitForEvent(CancellationToken cancel);

    /// <summary>Waits for the VM to close the session.</summary>
    Task WaitForEnd(TimeSpan deadline);
}
