using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Shell;

/// <summary>A QMP session with one VM of vmm or QEMU, for one command at a time; an out-of-band one may overtake it.</summary>
internal interface IMonitor : IAsyncDisposable
{
    /// <summary>Runs a command.</summary>
    /// <exception cref="MonitorException">The VM answered with an error.</exception>
    /// <exception cref="CliException">The connection ended, or the VM did not answer in time.</exception>
    Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel);

    /// <summary>Asks for a command while another one runs. Ignores a failure: the answer to the other command tells what has happened.</summary>
    Task RequestOutOfBand(string command);

    /// <summary>Waits until the VM has sent an event since the session began or the last wait ended, or has closed the session.</summary>
    Task WaitForEvent(CancellationToken cancel);

    /// <summary>Waits for the VM to close the session.</summary>
    Task WaitForEnd(TimeSpan deadline);
}
