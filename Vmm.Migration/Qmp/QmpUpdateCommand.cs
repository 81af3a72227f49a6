using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Update;

namespace Vmm.Migration.Qmp;

/// <summary>An update as a client requests it.</summary>
/// <param name="Binary">Program of the new process; null for the program that runs now.</param>
/// <param name="Method">Transfer or exec.</param>
/// <param name="Timeout">Time limit for the new process.</param>
public sealed record QmpUpdateRequest(string? Binary, UpdateMethod Method, TimeSpan Timeout);

/// <summary>The update command, an extension of vmm: moves the VM into a new process.</summary>
internal sealed class QmpUpdateCommand(QmpServer server, IVmUpdater? updater)
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
        if (updater is null || server.UpdateOptions is not { } describe) throw new DeviceNotActiveException("the host of this VM cannot start another process for it");
        int timeoutMs = (int)Math.Clamp(call.TryInt("timeout-ms") ?? DefaultTimeoutMs, 1, int.MaxValue);
        var request = new QmpUpdateRequest(call.TryStr("binary"), call.Bool("exec", false) ? UpdateMethod.Exec : UpdateMethod.Transfer, TimeSpan.FromMilliseconds(timeoutMs));
        UpdateResult result = updater.UpdateAsync(describe(request), call.Stopping).GetAwaiter().GetResult();
        // The new process runs the VM. This process ends once the client has the answer.
        call.AfterAnswer = () => server.RequestQuit(0, $"the VM runs in process {result.Pid} now");
        return new JsonObject { ["pid"] = result.Pid, ["pause-ms"] = result.PauseMs, ["total-ms"] = result.TotalMs, ["bytes"] = result.StreamBytes };
    }
}
