using System.Text.Json.Nodes;
using Vmm.Core.Errors;

namespace Vmm.Migration.Qmp;

/// <summary>Asks the host to carry its VM into a new process.</summary>
/// <param name="Binary">Program of the new process; null for the same one.</param>
/// <param name="Exec">Replace this process (cpr-exec) instead of starting another (cpr-transfer).</param>
/// <param name="TimeoutMs">How long the new process may take.</param>
/// <param name="Cancel">The server ends.</param>
public sealed record VmUpdateRequest(string? Binary, bool Exec, int TimeoutMs, CancellationToken Cancel);

/// <summary>How an update went.</summary>
/// <param name="Pid">The process that runs the VM now.</param>
/// <param name="PauseMs">From the stop of the VM to its start, ms.</param>
/// <param name="TotalMs">From the request to the end, ms.</param>
/// <param name="Bytes">Bytes of the stream.</param>
public sealed record VmUpdateResult(int Pid, double PauseMs, double TotalMs, long Bytes);

/// <summary>The update command; an extension: what a new process is made of, only the host knows.</summary>
internal sealed class QmpUpdateCommand(QmpServer server)
{
    private const int DefaultTimeoutMs = 30_000;

    internal IEnumerable<QmpCommand> Commands()
    {
        yield return new(
            QmpServer.ExtensionPrefix + "update",
            new(new("binary", QmpType.Str, true), new("exec", QmpType.Bool, true), new("timeout-ms", QmpType.UInt32, true)),
            new QmpObject(new("pid", QmpType.Int), new("pause-ms", QmpType.Number), new("total-ms", QmpType.Number), new("bytes", QmpType.Int)),
            Update);
    }

    private JsonObject Update(QmpCall call)
    {
        Func<VmUpdateRequest, VmUpdateResult> update = server.Updater ?? throw new DeviceNotActiveException("the host of this VM cannot start another process for it");
        int timeoutMs = (int)Math.Clamp(call.TryInt("timeout-ms") ?? DefaultTimeoutMs, 1, int.MaxValue);
        VmUpdateResult result = update(new VmUpdateRequest(call.TryStr("binary"), call.Bool("exec", false), timeoutMs, call.Stopping));
        // The VM runs elsewhere; what is left here ends once the client knows.
        call.AfterAnswer = () => server.RequestQuit(new QmpQuitRequest(0, $"the VM runs in process {result.Pid} now"));
        return new JsonObject { ["pid"] = result.Pid, ["pause-ms"] = result.PauseMs, ["total-ms"] = result.TotalMs, ["bytes"] = result.Bytes };
    }
}
