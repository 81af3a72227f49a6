using System.Collections.Concurrent;
using System.Text.Json.Nodes;
using System.Threading.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Core.Wire;

namespace Vmm.Migration.Qmp;

/// <summary>
/// One client (qmp 1 to 5) with its negotiation and its named descriptors. Runs in-band commands one at a time in order, and out-of-band commands as
/// soon as they are read. Every command that has arrived whole runs, also when the client has left by then; only <see cref="Abort"/> drops commands.
/// Reads and writes are asynchronous; only an in-band command has a thread while it runs, because it may block.
/// </summary>
#pragma warning disable CA1001 // RunAsync disposes what this class owns, in the right order.
internal sealed class QmpSession
#pragma warning restore CA1001
{
    /// <summary>The greatest number of queued in-band requests; while the queue is full, the reader waits (QEMU: QMP_REQ_QUEUE_LEN_MAX).</summary>
    internal const int MaxQueuedRequests = 8;

    private static readonly TimeSpan s_drainLimit = TimeSpan.FromSeconds(1);

    private readonly QmpServer _server;
    private readonly IQmpTransport _transport;
    private readonly QmpOutbox _outbox;
    private readonly Channel<Request> _inBand = Channel.CreateBounded<Request>(new BoundedChannelOptions(MaxQueuedRequests) { SingleWriter = true });
    private readonly CancellationTokenSource _gone = new(), _aborted = new();
    private readonly ConcurrentDictionary<string, OwnedFd> _namedFds = new();
    private readonly List<OwnedFd> _arrivedFds = [];
    private volatile bool _negotiated;
    private volatile bool _oob;
    private int _unanswered;
    private long _idleSince = Environment.TickCount64;

    internal QmpSession(QmpServer server, IQmpTransport transport)
    {
        _server = server;
        _transport = transport;
        _outbox = new QmpOutbox(transport);
    }

    private sealed record Request(QmpInput Input, List<OwnedFd> Fds);

    /// <summary>The answer to a request, and an action to run once the client has the answer.</summary>
    private readonly record struct Answer(byte[] Line, Action? Then);

    /// <summary>Fires when nobody reads the client's answers any more, or when the client is being disconnected.</summary>
    internal CancellationToken Gone => _gone.Token;

    /// <summary>True once the client is being disconnected.</summary>
    internal bool IsAborted => _aborted.IsCancellationRequested;

    /// <summary>
    /// Since when the client has had no command under way, in ms of <see cref="Environment.TickCount64"/>; null while it has one. A client that leaves its
    /// answers unread counts as idle.
    /// </summary>
    internal long? IdleSince => Volatile.Read(ref _unanswered) > 0 && !_outbox.IsFull ? null : Volatile.Read(ref _idleSince);

    /// <summary>Fires when the server is disposed.</summary>
    internal CancellationToken Stopping => _server.Stopping;

    /// <summary>Serves the client until it leaves or until <see cref="Abort"/>, then releases everything that the session owns.</summary>
    internal async Task RunAsync()
    {
        await _outbox.PostAnswerAsync(QmpJsonText.Line(new JsonObject
        {
            ["QMP"] = new JsonObject { ["version"] = QmpServer.Version(), ["capabilities"] = new JsonArray("oob") },
        })).ConfigureAwait(false);
        Task writer = _outbox.WriteAsync(), dispatcher = DispatchAsync(), reader = ReadAsync();
        const ConfigureAwaitOptions quiet = ConfigureAwaitOptions.SuppressThrowing;
        await reader.ConfigureAwait(quiet);
        await dispatcher.ConfigureAwait(quiet);
        await _gone.CancelAsync().ConfigureAwait(false);
        _outbox.Complete();
        // A client that closed only its writing side still gets its answers if it reads them in time.
        await writer.WaitAsync(s_drainLimit, _server.Stopping).ConfigureAwait(quiet);
        _transport.Shutdown();
        await writer.ConfigureAwait(quiet);
        if ((reader.Exception ?? dispatcher.Exception ?? writer.Exception) is { } fault) _server.Log.CommandFault(fault);
        _transport.Dispose();
        foreach (OwnedFd fd in _namedFds.Values) fd.Dispose();
    }

    /// <summary>Disconnects the client and drops its commands that have not begun. Any thread may call it; it never waits.</summary>
    internal void Abort()
    {
        _aborted.Cancel();
        _gone.Cancel();
        _transport.Shutdown();
    }

    /// <summary>Tells the client that it makes room for another one, then disconnects it. Never waits.</summary>
    internal void GiveWay(string reason)
    {
        _aborted.Cancel();
        _outbox.TryPostEvent(ErrorLine(reason));
        _ = _outbox.FlushAsync().WaitAsync(s_drainLimit).ContinueWith(_ => Abort(), CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default);
    }

    /// <summary>Queues an event if the client has negotiated; disconnects a client whose queue is full.</summary>
    internal void PostEvent(string name, byte[] line)
    {
        if (!_negotiated || _outbox.TryPostEvent(line)) return;
        _server.Log.ClientOverflow(name);
        Abort();
    }

    /// <summary>Completes the negotiation.</summary>
    internal void Negotiated(bool oob)
    {
        _oob = oob;
        _negotiated = true;
    }

    /// <summary>True once negotiation is complete.</summary>
    internal bool IsNegotiated => _negotiated;

    /// <summary>Keeps a descriptor under a name, and closes the one that had this name before.</summary>
    /// <exception cref="QmpErrorException">The client has too many; the caller still owns the descriptor.</exception>
    internal void AddNamedFd(string name, OwnedFd fd)
    {
        if (_namedFds.Count >= WireLimits.QmpFds && !_namedFds.ContainsKey(name))
            throw new QmpErrorException($"this client has {WireLimits.QmpFds} named descriptors, and no more are kept (WireLimits.QmpFds)");
        if (_namedFds.TryRemove(name, out OwnedFd? old)) old.Dispose();
        _namedFds[name] = fd;
    }

    /// <summary>Removes and returns a named descriptor, or null if there is none.</summary>
    internal OwnedFd? TakeNamedFd(string name) => _namedFds.TryRemove(name, out OwnedFd? fd) ? fd : null;

    private async Task ReadAsync()
    {
        try
        {
            var reader = new QmpJsonReader();
            var received = new List<OwnedFd>();
            byte[] buffer = new byte[16 << 10];
            for (int n; (n = await _transport.ReadAsync(buffer, received).ConfigureAwait(false)) > 0;)
            {
                if (received.Count > 0)
                {
                    // A later command must not get descriptors that came before it.
                    Close(_arrivedFds);
                    _arrivedFds.AddRange(received);
                    received.Clear();
                }
                reader.Feed(buffer.AsSpan(0, n));
                while (reader.TryTake(out QmpInput input))
                    if (!await AcceptAsync(input).ConfigureAwait(false)) return;
            }
        }
        finally
        {
            Close(_arrivedFds);
            // The dispatcher still runs what has arrived. A client that closed only its writing side waits for the answers.
            _inBand.Writer.TryComplete();
            if (_transport.HasPeerLeft) await _gone.CancelAsync().ConfigureAwait(false);
        }
    }

    private async Task<bool> AcceptAsync(QmpInput input)
    {
        var request = new Request(input, TakesFd(input.Value) ? [.. _arrivedFds] : []);
        if (request.Fds.Count > 0) _arrivedFds.Clear();
        Interlocked.Increment(ref _unanswered);
        if (input.Value is JsonObject o && o.ContainsKey("exec-oob") && !o.ContainsKey("execute"))
        {
            await SendAsync(Run(request)).ConfigureAwait(false);
            return true;
        }
        try
        {
            await _inBand.Writer.WriteAsync(request, _aborted.Token).ConfigureAwait(false);
            return true;
        }
        catch (OperationCanceledException)
        {
            // The client was disconnected while its queue was full.
            Close(request.Fds);
            Answered();
            return false;
        }
    }

    private bool TakesFd(JsonNode? value) =>
        (value as JsonObject)?["execute"] is JsonValue name && name.TryGetValue(out string? command) && _server.Commands.Find(command)?.TakesFd == true;

    private async Task DispatchAsync()
    {
        await foreach (Request request in _inBand.Reader.ReadAllAsync().ConfigureAwait(false))
        {
            if (IsAborted)
            {
                Close(request.Fds);
                continue;
            }
            // A command that blocks must not occupy a pool thread, because other clients and out-of-band commands need the pool.
            Answer answer = default;
            await WorkerThread.Run("qmp-command", () => answer = Run(request)).ConfigureAwait(false);
            await SendAsync(answer).ConfigureAwait(false);
        }
    }

    private async Task SendAsync(Answer answer)
    {
        await _outbox.PostAnswerAsync(answer.Line).ConfigureAwait(false);
        Answered();
        if (answer.Then is null) return;
        await _outbox.FlushAsync().WaitAsync(s_drainLimit).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        answer.Then();
    }

    private void Answered()
    {
        Volatile.Write(ref _idleSince, Environment.TickCount64);
        Interlocked.Decrement(ref _unanswered);
    }

    private Answer Run(Request request)
    {
        Action? then = null;
        JsonObject answer;
        try
        {
            if (request.Input.Error is not null) throw new QmpErrorException(request.Input.Error);
            answer = new JsonObject { ["return"] = Execute(request, ref then) ?? new JsonObject() };
        }
        catch (QmpErrorException e)
        {
            answer = Error(e.ClassName, e.Message, e.Hint);
        }
        catch (VmmException e)
        {
            answer = Error(e.QmpClass.ToString(), VmmException.Describe(e), e.Hint);
        }
        catch (OperationCanceledException)
        {
            answer = Error(nameof(QmpErrorClass.GenericError), "Operation canceled", null);
        }
#pragma warning disable CA1031 // A fault in one command must not end the control plane; it is reported to the client and logged.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _server.Log.CommandFault(e);
            answer = Error(nameof(QmpErrorClass.GenericError), $"internal error: {VmmException.Describe(e)}", null);
        }
        Close(request.Fds);
        if (request.Input.Value is JsonObject o && o.TryGetPropertyValue("id", out JsonNode? id)) answer["id"] = id?.DeepClone();
        return new Answer(QmpJsonText.Line(answer), then);
    }

    private JsonNode? Execute(Request request, ref Action? then)
    {
        if (request.Input.Value is not JsonObject message) throw new QmpErrorException("QMP input must be a JSON object");
        string verb = Verb(message);
        string name = message[verb]!.GetValue<string>();
        QmpCommand? command = _server.Commands.Find(name);
        if (!_negotiated && name != QmpCommandTable.Negotiate)
            throw new QmpErrorException(QmpErrorClass.CommandNotFound, $"Expecting capabilities negotiation with '{QmpCommandTable.Negotiate}'");
        if (command is null) throw new QmpErrorException(QmpErrorClass.CommandNotFound, $"The command {name} has not been found");
        if (verb == "exec-oob" && !command.AllowOob) throw new QmpErrorException($"The command {name} does not support OOB");
        var call = new QmpCall(this, message["arguments"] as JsonObject ?? [], request.Fds);
        command.Arguments.Check(call.Arguments, "arguments", string.Empty);
        using (_server.Fds.Serving(this))
        using (_server.EnterWork())
        {
            JsonNode? result = command.Run(call);
            then = call.AfterAnswer;
            return result;
        }
    }

    private string Verb(JsonObject message)
    {
        string? verb = null;
        foreach ((string key, JsonNode? value) in message)
        {
            if (key == "id") continue;
            if (key == "arguments")
            {
                if (value is not JsonObject) throw new QmpErrorException("QMP input member 'arguments' must be an object");
                continue;
            }
            if (key != "execute" && (key != "exec-oob" || !_oob)) throw new QmpErrorException($"QMP input member '{key}' is unexpected");
            if (value is not JsonValue text || !text.TryGetValue(out string? _)) throw new QmpErrorException($"QMP input member '{key}' must be a string");
            if (verb is not null) throw new QmpErrorException("QMP input member 'execute' clashes with 'exec-oob'");
            verb = key;
        }
        return verb ?? throw new QmpErrorException("QMP input lacks member 'execute'");
    }

    /// <summary>The bytes of an error that answers no command.</summary>
    internal static byte[] ErrorLine(string description) => QmpJsonText.Line(Error(nameof(QmpErrorClass.GenericError), description, null));

    private static JsonObject Error(string className, string description, string? hint)
    {
        var error = new JsonObject { ["class"] = className, ["desc"] = description };
        if (hint is not null) error[QmpServer.ExtensionPrefix + "hint"] = hint;
        return new JsonObject { ["error"] = error };
    }

    private static void Close(List<OwnedFd> fds)
    {
        foreach (OwnedFd fd in fds) fd.Dispose();
        fds.Clear();
    }
}
