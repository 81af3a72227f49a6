using System.Runtime.CompilerServices;
using System.Text.Json.Nodes;
using System.Threading.Channels;
using Nito.AsyncEx;
using Nito.AsyncEx.Synchronous;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Qmp;

/// <summary>An event of a QMP server.</summary>
/// <param name="Name">The event's name, e.g. <c>MIGRATION</c>.</param>
/// <param name="Data">The event's data; empty when it has none.</param>
/// <param name="Timestamp">The time of the event by the server's clock; null if the server sent none.</param>
public sealed record QmpEvent(string Name, JsonObject Data, DateTimeOffset? Timestamp);

/// <summary>
/// A QMP client for vmm and QEMU alike (qmp 1 to 5). Thread-safe; commands may overlap. It reads until <see cref="Dispose"/> or the end of the
/// connection; either fails all commands in flight.
/// </summary>
public sealed class QmpClient : IDisposable
{
    /// <summary>The greatest number of unread events that <see cref="Events"/> keeps; it drops the oldest.</summary>
    public const int EventBacklog = 4096;

    private readonly IQmpTransport _transport;
    private readonly string _peer;
    private readonly AsyncLock _writeGate = new();
    private readonly Lock _gate = new();
    private readonly SortedDictionary<long, TaskCompletionSource<JsonNode?>> _pending = [];
    private readonly TaskCompletionSource<JsonObject> _greeting = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Channel<QmpEvent> _events = Channel.CreateBounded<QmpEvent>(
        new BoundedChannelOptions(EventBacklog) { FullMode = BoundedChannelFullMode.DropOldest, SingleWriter = true });
    private Task _reader = Task.CompletedTask;
    private Exception? _ended;
    private long _nextId;
    private volatile int _callbackThreadId;

    private QmpClient(IQmpTransport transport, string peer) => (_transport, _peer) = (transport, peer);

    /// <summary>
    /// Raised for each event in order, on a pool thread, before the event appears in <see cref="Events"/>. A handler must not wait for a command,
    /// whose answer is read only after the handler returns.
    /// </summary>
    public event Action<QmpEvent>? EventReceived;

    /// <summary>The <c>QMP</c> member of the greeting: version and capabilities. Any thread.</summary>
    public JsonObject Greeting => _greeting.Task.Result;

    /// <summary>Completes when either side has ended the connection.</summary>
    public Task Closed => _reader;

    /// <summary>Connects to a server's socket and negotiates; out-of-band execution is enabled where the server offers it.</summary>
    /// <param name="path">Path of the UNIX socket.</param>
    /// <param name="deadline">Time limit for connecting and negotiating together.</param>
    /// <returns>A client ready for commands.</returns>
    /// <exception cref="ConfigurationException">The path is empty or too long for a socket.</exception>
    /// <exception cref="ChannelException">Nobody listens, or the server did not answer in time (ETIMEDOUT).</exception>
    /// <exception cref="QmpErrorException">The server refused the negotiation.</exception>
    public static QmpClient Connect(string path, TimeSpan deadline)
    {
        OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        long start = Environment.TickCount64;
        try
        {
            Errno errno = Posix.ConnectUnix(socket, path, null, (int)deadline.TotalMilliseconds);
            if (errno != Errno.None) throw Posix.Error($"cannot connect to QMP socket '{path}'", errno);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
        return Negotiate(new SocketQmpTransport(socket), path, deadline - TimeSpan.FromMilliseconds(Environment.TickCount64 - start));
    }

    /// <summary>As <see cref="Connect(string, TimeSpan)"/>, over a connected UNIX socket.</summary>
    /// <param name="socket">The socket, which the client owns from now on.</param>
    /// <param name="deadline">Time limit for negotiating.</param>
    /// <returns>A client ready for commands.</returns>
    /// <exception cref="ChannelException">The server has gone, or did not answer in time (ETIMEDOUT).</exception>
    /// <exception cref="QmpErrorException">The server refused the negotiation.</exception>
    public static QmpClient Attach(OwnedFd socket, TimeSpan deadline) => Negotiate(new SocketQmpTransport(socket), "socket", deadline);

    /// <summary>Runs a command.</summary>
    /// <param name="command">The command's name.</param>
    /// <param name="arguments">The command's arguments, or null for none.</param>
    /// <param name="fd">A descriptor to send with the command (getfd, add-fd); the caller keeps it.</param>
    /// <param name="outOfBand">True runs the command out-of-band.</param>
    /// <param name="cancel">Ends the wait; the server continues the command.</param>
    /// <returns>The returned value; never null for commands that return data.</returns>
    /// <exception cref="QmpErrorException">The server's error.</exception>
    /// <exception cref="ChannelException">The connection ended first.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired.</exception>
    public async Task<JsonNode?> ExecuteAsync(string command, JsonObject? arguments = null, OwnedFd? fd = null, bool outOfBand = false,
        CancellationToken cancel = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(command);
        long id = Interlocked.Increment(ref _nextId);
        var answer = new TaskCompletionSource<JsonNode?>(TaskCreationOptions.RunContinuationsAsynchronously);
        var request = new JsonObject { [outOfBand ? "exec-oob" : "execute"] = command, ["id"] = id };
        if (arguments is not null) request["arguments"] = arguments.DeepClone();
        lock (_gate)
        {
            if (_ended is not null) throw Lost(command);
            _pending.Add(id, answer);
        }
        bool sent;
        using (await _writeGate.LockAsync(CancellationToken.None).ConfigureAwait(false)) sent = await _transport.WriteAsync(QmpJsonText.Line(request), fd).ConfigureAwait(false);
        if (!sent) _transport.Shutdown();
        try
        {
            return await answer.Task.WaitAsync(cancel).ConfigureAwait(false);
        }
        catch (ConnectionLostException)
        {
            throw Lost(command);
        }
        finally
        {
            lock (_gate) _pending.Remove(id);
        }
    }

    /// <summary>Runs a command and waits for its answer. Not for handlers of <see cref="EventReceived"/>, which would wait for themselves.</summary>
    /// <param name="command">The command's name.</param>
    /// <param name="arguments">The command's arguments, or null for none.</param>
    /// <param name="deadline">How long to wait; 30 s by default.</param>
    /// <returns>The returned value.</returns>
    /// <exception cref="ChannelException">The connection ended, or the deadline passed (ETIMEDOUT).</exception>
    /// <exception cref="QmpErrorException">The server's error.</exception>
    public JsonNode? Execute(string command, JsonObject? arguments = null, TimeSpan? deadline = null)
    {
        using var cancel = new CancellationTokenSource(deadline ?? TimeSpan.FromSeconds(30));
        try
        {
            return ExecuteAsync(command, arguments, cancel: cancel.Token).WaitAndUnwrapException();
        }
        catch (OperationCanceledException)
        {
            throw new ChannelException($"QMP command '{command}' was not answered in time by '{_peer}'", Errno.ETIMEDOUT);
        }
    }

    /// <summary>Returns each event since the connection began, in order, to a single consumer; the sequence ends with the connection.</summary>
    /// <param name="cancel">Ends the sequence.</param>
    /// <returns>The events, oldest first.</returns>
    public async IAsyncEnumerable<QmpEvent> Events([EnumeratorCancellation] CancellationToken cancel = default)
    {
        await foreach (QmpEvent one in _events.Reader.ReadAllAsync(cancel).ConfigureAwait(false)) yield return one;
    }

    /// <summary>Reads events until one matches; the events before it no longer appear in <see cref="Events"/>.</summary>
    /// <param name="name">The event's name.</param>
    /// <param name="matches">A further condition, or null for none.</param>
    /// <param name="cancel">Ends the wait.</param>
    /// <returns>The event.</returns>
    /// <exception cref="ChannelException">The connection ended first.</exception>
    public async Task<QmpEvent> WaitForEventAsync(string name, Func<QmpEvent, bool>? matches = null, CancellationToken cancel = default)
    {
        await foreach (QmpEvent one in Events(cancel).ConfigureAwait(false))
            if (one.Name == name && matches?.Invoke(one) != false) return one;
        throw Lost($"event {name}");
    }

    /// <summary>Closes the connection and waits for the reader, except in an event handler; commands in flight fail. Idempotent.</summary>
    public void Dispose()
    {
        _transport.Shutdown();
        // The reader uses the transport until it sees the end, so wait for it. An event handler must not: it would wait for itself.
        if (Environment.CurrentManagedThreadId != _callbackThreadId) _reader.WaitWithoutException();
        _transport.Dispose();
    }

    private static QmpClient Negotiate(IQmpTransport transport, string peer, TimeSpan deadline)
    {
        var client = new QmpClient(transport, peer);
        client._reader = Task.Run(client.ReadAsync);
        try
        {
            using var cancel = new CancellationTokenSource(deadline > TimeSpan.Zero ? deadline : TimeSpan.Zero);
            client.NegotiateAsync(cancel.Token).WaitAndUnwrapException();
            return client;
        }
        catch (OperationCanceledException)
        {
            client.Dispose();
            throw new ChannelException($"QMP server '{peer}' did not greet in time (QEMU greets a client only after the one before has left)", Errno.ETIMEDOUT);
        }
        catch
        {
            client.Dispose();
            throw;
        }
    }

    private async Task NegotiateAsync(CancellationToken cancel)
    {
        JsonObject greeting = await _greeting.Task.WaitAsync(cancel).ConfigureAwait(false);
        bool oob = greeting["capabilities"] is JsonArray offered && offered.Any(static c => c is JsonValue v && v.TryGetValue(out string? s) && s == "oob");
        await ExecuteAsync("qmp_capabilities", oob ? new JsonObject { ["enable"] = new JsonArray("oob") } : null, cancel: cancel).ConfigureAwait(false);
    }

    private async Task ReadAsync()
    {
        string why = "closed the connection";
        try
        {
            why = await PumpAsync().ConfigureAwait(false) ?? why;
        }
        finally
        {
            End(new ConnectionLostException($"QMP server '{_peer}' {why}"));
        }
    }

    /// <summary>Handles messages up to the end of the connection.</summary>
    /// <returns>How the server broke the protocol, or null.</returns>
    private async Task<string?> PumpAsync()
    {
        string? wrong = null;
        var reader = new QmpJsonReader();
        var fds = new List<OwnedFd>();
        byte[] buffer = new byte[32 << 10];
        for (int n; (n = await _transport.ReadAsync(buffer, fds).ConfigureAwait(false)) > 0;)
        {
            foreach (OwnedFd fd in fds) fd.Dispose();
            fds.Clear();
            reader.Feed(buffer.AsSpan(0, n));
            while (reader.TryTake(out QmpInput input))
            {
                if (input.Value is JsonObject message && Handle(message)) continue;
                wrong = $"sent something that is not QMP: {input.Error ?? input.Value?.ToJsonString() ?? "null"}";
                _transport.Shutdown();
            }
        }
        return wrong;
    }

    private void Raise(QmpEvent one)
    {
        if (EventReceived is not { } handlers) return;
        _callbackThreadId = Environment.CurrentManagedThreadId;
        try
        {
            handlers(one);
        }
        finally
        {
            _callbackThreadId = 0;
        }
    }

    private bool Handle(JsonObject message)
    {
        if (message["event"] is JsonValue name)
        {
            var one = new QmpEvent(name.ToString(), message["data"] as JsonObject ?? [], Timestamp(message["timestamp"] as JsonObject));
            Raise(one);
            _events.Writer.TryWrite(one);
            return true;
        }
        if (message["QMP"] is JsonObject greeting) return _greeting.TrySetResult(greeting);
        if (message["error"] is JsonObject error)
        {
            // An error in place of the greeting says why the server takes no client.
            _greeting.TrySetException(new ChannelException($"QMP server '{_peer}' refused: {error["desc"]}", Errno.EBUSY));
            TakePending(message)?.TrySetException(new QmpErrorException(error["class"]?.ToString() ?? "GenericError", error["desc"]?.ToString() ?? "no description"));
            return true;
        }
        if (!message.ContainsKey("return")) return false;
        TakePending(message)?.TrySetResult(message["return"]);
        return true;
    }

    // An answer without an id reports a parse error. It belongs to the oldest command, because the server answers in order.
    private TaskCompletionSource<JsonNode?>? TakePending(JsonObject message)
    {
        lock (_gate)
        {
            if (message["id"] is JsonValue id && id.TryGetValue(out long n)) return _pending.GetValueOrDefault(n);
            return _pending.Count > 0 ? _pending.First().Value : null;
        }
    }

    private void End(ConnectionLostException why)
    {
        TaskCompletionSource<JsonNode?>[] pending;
        lock (_gate)
        {
            _ended = why;
            pending = [.. _pending.Values];
        }
        foreach (TaskCompletionSource<JsonNode?> one in pending) one.TrySetException(why);
        _greeting.TrySetException(new ChannelException(why.Message, Errno.ECONNRESET));
        // Nobody awaits the greeting of a client that is disposed before it comes; reading the exception marks it as observed.
        _ = _greeting.Task.Exception;
        _events.Writer.TryComplete();
    }

    private ChannelException Lost(string what) => new($"{what}: {_ended!.Message}", Errno.ECONNRESET);

    private static DateTimeOffset? Timestamp(JsonObject? stamp)
    {
        if (stamp?["seconds"] is not JsonValue s || !s.TryGetValue(out long seconds) || seconds is < 0 or > 253402300799) return null;
        long micro = stamp["microseconds"] is JsonValue m && m.TryGetValue(out long value) ? value : 0;
        return DateTimeOffset.FromUnixTimeSeconds(seconds).AddTicks(Math.Clamp(micro, 0, 999_999) * TimeSpan.TicksPerMicrosecond);
    }

    private sealed class ConnectionLostException(string message) : Exception(message);
}
