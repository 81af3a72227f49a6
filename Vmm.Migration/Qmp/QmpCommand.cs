using System.Text.Json.Nodes;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>A command: its declaration and its work. The arguments fit the declaration when <see cref="Run"/> is called.</summary>
/// <param name="Name">The name on the wire.</param>
/// <param name="Arguments">The type of the arguments.</param>
/// <param name="Returns">The type of the result; a null result stands for the empty object.</param>
/// <param name="Run">The work. In-band it runs on a dedicated thread, may block, and takes the BQL itself. It fails with a VmmException.</param>
internal sealed record QmpCommand(string Name, QmpObject Arguments, QmpType Returns, Func<QmpCall, JsonNode?> Run)
{
    internal QmpCommand(string name, Func<QmpCall, JsonNode?> run) : this(name, QmpObject.Empty, QmpObject.Empty, run)
    {
    }

    /// <summary>True if the command may run out-of-band, on a pool thread; it must not block or take the BQL.</summary>
    internal bool AllowOob { get; init; }

    /// <summary>True if the command works, but query-commands and the schema leave it out.</summary>
    internal bool Hidden { get; init; }

    /// <summary>True if the command takes the descriptor that came with it.</summary>
    internal bool TakesFd { get; init; }
}

/// <summary>An event's declaration.</summary>
internal sealed record QmpEventType(string Name, QmpObject Data);

/// <summary>One invocation of a command.</summary>
/// <param name="Session">The client that sent it.</param>
/// <param name="Arguments">The arguments, which fit the declaration.</param>
/// <param name="Fds">Descriptors that came with it. The command owns those that it removes; the session closes the others.</param>
internal sealed record QmpCall(QmpSession Session, JsonObject Arguments, List<OwnedFd> Fds)
{
    /// <summary>An action to run once the answer has been written, or null. It does not run after an error.</summary>
    internal Action? AfterAnswer { get; set; }

    /// <summary>Fires when the client has left or the server is disposed.</summary>
    internal CancellationToken Gone => Session.Gone;

    /// <summary>Fires when the server is disposed. As in QEMU, a command continues when only its client has left.</summary>
    internal CancellationToken Stopping => Session.Stopping;

    internal string Str(string name) => TryStr(name)!;

    internal string? TryStr(string name) => Arguments[name]?.GetValue<string>();

    internal bool Bool(string name, bool fallback) => Arguments[name]?.GetValue<bool>() ?? fallback;

    internal long? TryInt(string name) => Arguments[name]?.GetValue<long>();

    internal long Int(string name) => TryInt(name)!.Value;

    internal JsonArray Array(string name) => (JsonArray)Arguments[name]!;
}
