using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Update;

namespace Vmm.Migration.Qmp;

/// <summary>An update as a client requests it.</summary>
/// <param name="Binary">Program of the new process; null for the program that runs now.</param>
/// <param name="Method">Transfer or exec.</param>
/// <param name="Timeout">Time limit for the new process.</param>
public sealed record QmpUpdateRequest(string? Binary, UpdateMethod Method, TimeSpan Timeout);

/// <summary>
/// The update commands, extensions of vmm: one moves the VM into a new process and one, which also runs out-of-band, cancels the move. The answer to the
/// first says what has happened. Thread-safe.
/// </summary>
internal sealed class QmpUpdateCommand(QmpServer server, IVmUpdater? updater)
{
    private readonly Lock _gate = new();
    private CancellationTokenSource? _running;

    private const int DefaultTimeoutMs = 30_000;

    internal IEnumerable<QmpCommand> Commands()
    {
        yield return new(
            QmpServer.ExtensionPrefix + "update",
            new(new("binary", QmpType.Str, true), new("exec", QmpType.Bool, true), new("timeout-ms", QmpType.UInt32, true)),
            new QmpObject(new("pid", QmpType.Int), new("pause-ms", QmpType.Number), new("total-ms", QmpType.Number), new("bytes", QmpType.Int)),
            Update);
        yield return new(QmpServer.ExtensionPrefix + "update-cancel", _ => { Cancel(); return null; }) { AllowOob = true };
    }

    private JsonObject Update(QmpCall call)
    {
        if (updater is null || server.UpdateOptions is not { } describe) throw new DeviceNotActiveException("the host of this VM cannot start another process for it");
        int timeoutMs = (int)Math.Clamp(call.TryInt("timeout-ms") ?? DefaultTimeoutMs, 1, int.MaxValue);
        var request = new QmpUpdateRequest(call.TryStr("binary"), call.Bool("exec", false) ? UpdateMethod.Exec : UpdateMethod.Transfer, TimeSpan.FromMilliseconds(timeoutMs));
        UpdateResult result = Run(updater, describe(request), call.Stopping);
        // The new process runs the VM. This process ends once the client has the answer.
        call.AfterAnswer = () => server.RequestQuit(0, $"the VM runs in process {result.Pid} now");
        return new JsonObject { ["pid"] = result.Pid, ["pause-ms"] = result.PauseMs, ["total-ms"] = result.TotalMs, ["bytes"] = result.StreamBytes };
    }

    private UpdateResult Run(IVmUpdater updater, UpdateOptions options, CancellationToken stopping)
    {
        using var cancel = CancellationTokenSource.CreateLinkedTokenSource(stopping);
        lock (_gate)
        {
            if (_running is not null) throw new MigrationFailedException("an update of this VM is under way");
            _running = cancel;
        }
        try
        {
            return updater.UpdateAsync(options, cancel.Token).GetAwaiter().GetResult();
        }
        finally
        {
            lock (_gate) _running = null;
        }
    }

    /// <summary>Does nothing if no update runs.</summary>
    private void Cancel()
    {
        // On another thread, because it wakes code that may take the BQL, which an out-of-band command must not wait for.
        lock (_gate) _running?.CancelAsync();
    }
}
