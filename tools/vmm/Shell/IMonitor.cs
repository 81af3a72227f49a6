using System.Text.Json.Nodes;

namespace Vmm.Tools.Cli.Client;

/// <summary>A QMP session with one VM, ours or QEMU's. One command at a time.</summary>
internal interface IMonitor : IAsyncDisposable
{
    /// <summary>Runs a command.</summary>
    /// <exception cref="MonitorException">The VM answered an error.</exception>
    /// <exception cref="Shell.CliException">The VM went away.</exception>
    Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel);

    /// <summary>Waits for the VM to close the session.</summary>
    Task WaitForEnd(TimeSpan deadline);
}

/// <summary>A QMP error answer.</summary>
/// <param name="errorClass">QMP's class, e.g. <c>GenericError</c>.</param>
/// <param name="description">QMP's text.</param>
internal sealed class MonitorException(string errorClass, string description) : Exception(description)
{
    public string ErrorClass { get; } = errorClass;
}
