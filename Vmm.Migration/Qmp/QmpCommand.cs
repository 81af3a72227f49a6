using System.Text.Json.Nodes;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>A command: its declaration and what it does. Arguments have been checked against the declaration when <see cref="Run"/> is called.</summary>
/// <param name="Name">The name.</param>
/// <param name="Arguments">The arguments' type.</param>
/// <param name="Returns">The returned type; a null result stands for the empty object.</param>
/// <param name="Run">The work. In-band: on a thread of its own, may block, takes the BQL itself. Failure is a VmmException.</param>
internal sealed record QmpCommand(string Name, QmpObject Arguments, QmpType Returns, Func<QmpCall, JsonNode?> Run)
{
    internal QmpCommand(string name, Func<QmpCall, JsonNode?> run) : this(name, QmpObject.Empty, QmpObject.Empty, run)
    {
    }

    /// <summary>May run out-of-band: on a thread of the pool; must not block or take the BQL.</summary>
    internal bool AllowOob { get; init; }

    /// <summary>Works but is neither listed nor in the schema.</summary>
    internal bool Hidden { get; init; }

    /// <summary>Takes the descriptor that came with the command.</summary>
    internal bool TakesFd { get; init; }
}

/// <summary>An event's declaration.</summary>
/// <param name="Name">The name.</param>
/// <param name="Data">The type of its data.</param>
internal sealed record QmpEventType(string Name, QmpObject Data);

/// <summary>One invocation of a command.</summary>
/// <param name="Session">The client.</param>
/// <param name="Arguments">Checked arguments.</param>
/// <param name="Fds">Descriptors that came with it; whoever takes one owns it, the others are closed afterwards.</param>
internal sealed record QmpCall(QmpSession Session, JsonObject Arguments, List<OwnedFd> Fds)
{
    /// <summary>Something to do once the answer has been written, or null; not done after an error.</summary>
    internal Action? AfterAnswer { get; set; }

    /// <summary>Fires when the client has gone or the server ends.</summary>
    internal CancellationToken Gone => Session.Gone;

    /// <summary>Fires when the server ends. What was asked for goes on when only the client has gone, as in QEMU.</summary>
    internal CancellationToken Stopping => Session.Stopping;

    internal string Str(string name) => TryStr(name)!;

    internal string? TryStr(string name) => Arguments[name]?.GetValue<string>();

    internal bool Bool(string name, bool fallback) => Arguments[name]?.GetValue<bool>() ?? fallback;

    internal long? TryInt(string name) => Arguments[name]?.GetValue<long>();

    internal long Int(string name) => TryInt(name)!.Value;

    internal JsonArray Array(string name) => (JsonArray)Arguments[name]!;
}
