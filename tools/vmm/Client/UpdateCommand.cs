using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary><c>vmm update</c>: asks the VM's process to carry the VM into a new one, and prints how long the guest stood still.</summary>
internal sealed class UpdateCommand(CliContext context, VmTarget target)
{
    /// <summary>The new program, or null for the VM's own.</summary>
    public string? Binary { get; init; }

    /// <summary>Replace the process instead of starting another.</summary>
    public bool Exec { get; init; }

    /// <summary>How long the new process may take.</summary>
    public TimeSpan Timeout { get; init; }

    public bool Json { get; init; }

    public async Task<ExitCode> Run()
    {
        if (Timeout <= TimeSpan.Zero || Timeout.TotalMilliseconds > int.MaxValue) throw CliException.Usage("--timeout expects seconds, over 0");
        await using IMonitor monitor = await target.Connect(context, context.Interrupted);
        var arguments = new JsonObject { ["exec"] = Exec, ["timeout-ms"] = (int)Timeout.TotalMilliseconds };
        if (Binary is not null) arguments["binary"] = Path.GetFullPath(Binary);
        JsonNode? result = await monitor.Execute(QmpServer.ExtensionPrefix + "update", arguments, context.Interrupted);
        if (Json) Format.WriteJson(context.Out, (JsonObject)result!.DeepClone());
        else context.Out.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"updated: the VM runs in process {result.Number("pid"):0}; it stood still for {result.Number("pause-ms"):0.0} ms, {result.Number("bytes"):0} bytes moved, {result.Number("total-ms"):0} ms in all"));
        return ExitCode.Ok;
    }
}
