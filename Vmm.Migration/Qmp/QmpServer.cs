using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using Nito.AsyncEx.Synchronous;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Migration.Update;

namespace Vmm.Migration.Qmp;

/// <summary>
/// The QMP control plane of one VM (docs/spec/qmp.md): any number of clients on any number of sockets, each with its own negotiation, ids, named
/// descriptors and event feed. Thread-safe. <see cref="Dispose"/> ends clients, jobs and sockets; the VM and its migration continue.
/// </summary>
public sealed class QmpServer : IDisposable
{
    /// <summary>Prefix of every name on the wire that vmm adds to QEMU's.</summary>
    public const string ExtensionPrefix = "__io.github.vmm_";

    /// <summary>The block node name of the snapshot store in <c>snapshot-save</c>, <c>snapshot-load</c> and <c>snapshot-delete</c>.</summary>
    public const string SnapshotNodeName = "vmm-snapshots";

    /// <summary>
    /// The greatest number of connected clients. One more takes the place of a client that waits for nothing: one that has not negotiated, else the one
    /// that has been idle longest. If every client has a command under way, the new one is told so and disconnected.
    /// </summary>
    public const int MaxClients = 128;

    private readonly Vm _vm;
    private readonly IMigrationEngine _engine;
    private readonly Lock _gate = new();
    private readonly Dictionary<QmpSession, Task> _sessions = [];
    private readonly List<QmpListener> _listeners = [];
    private readonly CancellationTokenSource _stopping = new();
    private readonly TaskCompletionSource<(int ExitCode, string? Reason)> _quit = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly QmpJobs _jobs;
    private readonly QmpDirtyRate _dirtyRate;
    private volatile QmpSession[] _clients = [];
    private readonly ThreadLocal<bool> _inWork = new();
    private Task? _ended;
    // Set and read with the BQL held.
    private bool _resetting;

    /// <summary>Parses what stands behind <c>--incoming</c>: a URI, <c>defer</c>, or QMP's MigrationChannel as JSON (qmp 8.2).</summary>
    /// <param name="text">E.g. <c>tcp:127.0.0.1:0</c> or <c>{"channel-type":"cpr","addr":{...}}</c>.</param>
    /// <returns>Whether descriptors come over the channel (type cpr; else main), and where it is; null for <c>defer</c>.</returns>
    /// <exception cref="ConfigurationException">Names what is wrong.</exception>
    public static (bool IsCpr, MigrationAddress? Address) ParseIncoming(string text)
    {
        var channel = MigrationChannelArgument.Parse(text);
        return (channel.IsCpr, channel.Address);
    }

    /// <summary>The JSON that <see cref="ParseIncoming"/> reads for a UNIX socket.</summary>
    /// <param name="type"><c>main</c> or <c>cpr</c>.</param>
    /// <param name="path">Path of the socket.</param>
    /// <returns>The text.</returns>
    public static string IncomingUnix(string type, string path) => MigrationChannelArgument.Unix(type, path);

    /// <summary>Makes a server without clients; <see cref="Listen"/> and <see cref="Serve(OwnedFd)"/> bring them.</summary>
    /// <param name="vm">The VM to control.</param>
    /// <param name="engine">Its migration engine; gets this server's descriptor look-ups.</param>
    /// <param name="snapshots">Its snapshots, or null when it has no store.</param>
    /// <param name="loggers">Loggers, or null.</param>
    /// <param name="updater">Its updater, or null for a host that starts no other process.</param>
    public QmpServer(Vm vm, IMigrationEngine engine, ISnapshotService? snapshots = null, ILoggerFactory? loggers = null, IVmUpdater? updater = null)
    {
        ArgumentNullException.ThrowIfNull(vm);
        ArgumentNullException.ThrowIfNull(engine);
        _vm = vm;
        _engine = engine;
        Log = new QmpLog((loggers ?? NullLoggerFactory.Instance).CreateLogger("Vmm.Migration.Qmp"));
        Fds = new QmpFds(() => _clients);
        _jobs = new QmpJobs(this, snapshots);
        _dirtyRate = new QmpDirtyRate(vm, engine);
        var control = new QmpControlCommands(this, vm);
        var migration = new QmpMigrationCommands(this, vm, engine);
        Commands = new QmpCommandTable(
            [
                .. control.Commands(), .. migration.Commands(), .. Fds.Commands(), .. _dirtyRate.Commands(), .. _jobs.Commands(),
                .. new HumanMonitor(vm, engine, snapshots, migration).Commands(), .. new QmpWorkloadCommands(this, vm).Commands(),
                .. new QmpUpdateCommand(this, updater).Commands(),
            ],
            QmpEvents.All);
        engine.TakeNamedFd = Fds.TakeNamed;
        engine.OpenFdSet = Fds.OpenSet;
        engine.StatusChanged += OnMigrationStatus;
        engine.PassCompleted += OnMigrationPass;
        vm.RunState.Changed += OnRunState;
        vm.ResetDone += OnReset;
        vm.Events.Raised += OnDeviceEvent;
        vm.Events.Lost += OnDeviceLost;
        vm.Events.Returned += OnDeviceReturned;
        vm.Disposing += Dispose;
    }

    /// <summary>Completes when a client or a failed incoming migration asks the process to end. The answer to <c>quit</c> has been sent by then.</summary>
    public Task<(int ExitCode, string? Reason)> QuitRequested => _quit.Task;

    /// <summary>Number of connected clients.</summary>
    public int ClientCount => _clients.Length;

    /// <summary>Builds the options of an update that a client requests, on the command's thread; null refuses such requests. BQL: not held.</summary>
    public Func<QmpUpdateRequest, UpdateOptions>? UpdateOptions { get; set; }

    internal QmpLog Log { get; }

    internal QmpCommandTable Commands { get; }

    internal QmpFds Fds { get; }

    internal CancellationToken Stopping => _stopping.Token;

    /// <summary>
    /// Listens on a UNIX socket of mode 0600; makes missing folders with mode 0700. The server's disposal removes the socket file if it is still the one
    /// made here.
    /// </summary>
    /// <param name="path">
    /// Replaces a stale socket file; refuses any other file and a symbolic link. Most clients need a path of at most 107 bytes; this product's own shorten
    /// it.
    /// </param>
    /// <exception cref="ConfigurationException">The path is refused or in use, or another user could replace the socket.</exception>
    /// <exception cref="ChannelException">The socket cannot be made.</exception>
    /// <exception cref="ObjectDisposedException">The server has ended.</exception>
    public void Listen(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_ended is not null, this);
            _listeners.Add(new QmpListener(path, fd => Serve(new SocketQmpTransport(fd)), Log));
        }
    }

    /// <summary>Renames a listening socket's file, and replaces a socket file at the new path. Clients of both sockets stay connected.</summary>
    /// <param name="from">A path given to <see cref="Listen"/>.</param>
    /// <param name="to">The new path, on the same file system.</param>
    /// <exception cref="InvalidOperationException">No socket listens at <paramref name="from"/>.</exception>
    /// <exception cref="IOException">The file cannot be renamed.</exception>
    public void MoveListener(string from, string to)
    {
        lock (_gate) _listeners.Single(l => l.Path == from).MoveTo(to);
    }

    /// <summary>Serves a client on a connected UNIX socket.</summary>
    /// <param name="socket">The socket, which the server owns from now on.</param>
    /// <returns>Completes when the client has gone.</returns>
    public Task Serve(OwnedFd socket) => Serve(new SocketQmpTransport(socket));

    /// <summary>Serves a client on a pair of streams, e.g. standard input and output; it cannot pass descriptors.</summary>
    /// <param name="input">The stream to read from, which the server owns from now on. Disposing it must wake a blocked read.</param>
    /// <param name="output">The stream to write to, which the server owns from now on.</param>
    /// <returns>Completes when the client has gone.</returns>
    public Task Serve(System.IO.Stream input, System.IO.Stream output) => Serve(new StreamQmpTransport(input, output));

    /// <summary>Announces the end of the VM to all clients (event SHUTDOWN).</summary>
    /// <param name="reason">QEMU's ShutdownCause, e.g. <c>host-signal</c>.</param>
    public void Shutdown(string reason) => Broadcast("SHUTDOWN", new JsonObject { ["guest"] = false, ["reason"] = reason });

    /// <summary>
    /// Disconnects all clients, ends everything that this server started, and waits for the end. Call it without the BQL, because a running command may
    /// need the BQL to end. A call from a command or a job does not wait, because it would wait for itself. Idempotent; the VM's disposal calls it too.
    /// </summary>
    public void Dispose()
    {
        Task ended;
        lock (_gate) ended = _ended ??= Task.Run(EndAsync);
        if (!_inWork.Value) ended.WaitAndUnwrapException();
    }

    private async Task EndAsync()
    {
        _engine.StatusChanged -= OnMigrationStatus;
        _engine.PassCompleted -= OnMigrationPass;
        _vm.RunState.Changed -= OnRunState;
        _vm.ResetDone -= OnReset;
        _vm.Events.Raised -= OnDeviceEvent;
        _vm.Events.Lost -= OnDeviceLost;
        _vm.Events.Returned -= OnDeviceReturned;
        _vm.Disposing -= Dispose;
        // No listener or session is added any more: both additions take the gate and check _ended.
        foreach (QmpListener listener in _listeners) listener.Dispose();
        await _stopping.CancelAsync().ConfigureAwait(false);
        KeyValuePair<QmpSession, Task>[] sessions;
        lock (_gate) sessions = [.. _sessions];
        foreach ((QmpSession session, _) in sessions) session.Abort();
        await Task.WhenAll([.. sessions.Select(static s => s.Value), _jobs.DisposeAsync().AsTask(), _dirtyRate.DisposeAsync().AsTask()]).ConfigureAwait(false);
        if (_engine.TakeNamedFd == Fds.TakeNamed) _engine.TakeNamedFd = null;
        if (_engine.OpenFdSet == Fds.OpenSet) _engine.OpenFdSet = null;
        Fds.Dispose();
        _stopping.Dispose();
    }

    /// <summary>Marks the calling thread as a command's or a job's until the result is disposed; <see cref="Dispose"/> does not wait there.</summary>
    internal WorkScope EnterWork() => new(_inWork);

    /// <summary>Undoes <see cref="EnterWork"/> when disposed.</summary>
    internal readonly struct WorkScope : IDisposable
    {
        private readonly ThreadLocal<bool> _mark;

        internal WorkScope(ThreadLocal<bool> mark) => (_mark = mark).Value = true;

        public void Dispose() => _mark.Value = false;
    }

    /// <summary>The version object of greeting and query-version: the QEMU version whose wire behaviour this server has, and vmm's own version.</summary>
    internal static JsonObject Version() => new()
    {
        ["qemu"] = new JsonObject { ["micro"] = 3, ["minor"] = 1, ["major"] = 11 },
        ["package"] = $"vmm {typeof(QmpServer).Assembly.GetName().Version?.ToString(3)}",
    };

    internal void RequestQuit(int exitCode, string? reason) => _quit.TrySetResult((exitCode, reason));

    /// <summary>Resets the VM. As in QEMU, clients get no STOP and RESUME events for the stop inside a reset.</summary>
    internal void ResetVm()
    {
        using (_vm.Bql.Acquire())
        {
            _resetting = true;
            try
            {
                _vm.Reset();
            }
            finally
            {
                _resetting = false;
            }
        }
    }

    internal void Broadcast(string name, JsonObject? data)
    {
        QmpSession[] clients = _clients;
        if (clients.Length == 0) return;
        long ticks = (DateTimeOffset.UtcNow - DateTimeOffset.UnixEpoch).Ticks;
        var message = new JsonObject
        {
            ["timestamp"] = new JsonObject
            {
                ["seconds"] = ticks / TimeSpan.TicksPerSecond, ["microseconds"] = ticks % TimeSpan.TicksPerSecond / TimeSpan.TicksPerMicrosecond,
            },
            ["event"] = name,
        };
        if (data is not null) message["data"] = data;
        byte[] line = QmpJsonText.Line(message);
        foreach (QmpSession client in clients) client.PostEvent(name, line);
    }

    private Task Serve(IQmpTransport transport)
    {
        lock (_gate)
        {
            if (_ended is not null)
            {
                transport.Dispose();
                return Task.CompletedTask;
            }
            if (!MakeRoom()) return RefuseAsync(transport);
            var session = new QmpSession(this, transport);
            Task run = Task.Run(session.RunAsync);
            _sessions.Add(session, run);
            _clients = [.. _sessions.Keys];
            return run.ContinueWith(_ => Remove(session), CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
        }
    }

    /// <summary>Disconnects an idle client if there is no room for one more. The gate is held.</summary>
    /// <returns>False if there is none.</returns>
    private bool MakeRoom()
    {
        QmpSession[] present = [.. _sessions.Keys.Where(static s => !s.IsAborted)];
        if (present.Length < MaxClients) return true;
        QmpSession? idle = present.Where(static s => s.IdleSince is not null).OrderBy(static s => s.IsNegotiated).ThenBy(static s => s.IdleSince).FirstOrDefault();
        if (idle is null) return false;
        Log.ClientGaveWay(MaxClients);
        idle.GiveWay($"disconnected: all {MaxClients} clients' places were taken, and this client had been idle longest");
        return true;
    }

    private static async Task RefuseAsync(IQmpTransport transport)
    {
        using (transport)
            await transport.WriteAsync(QmpSession.ErrorLine($"{MaxClients} clients are connected and each has a command under way; try again later")).ConfigureAwait(false);
    }

    private void Remove(QmpSession session)
    {
        lock (_gate)
        {
            _sessions.Remove(session);
            _clients = [.. _sessions.Keys];
        }
    }

    private void OnRunState(RunState from, RunState to)
    {
        bool was = RunStateTable.IsLive(from), now = RunStateTable.IsLive(to);
        if (was != now && !_resetting) Broadcast(now ? "RESUME" : "STOP", null);
    }

    private void OnDeviceEvent(string name, IReadOnlyList<KeyValuePair<string, string>> data) =>
        Broadcast(name, new JsonObject(data.Select(static d => KeyValuePair.Create(d.Key, (JsonNode?)JsonValue.Create(d.Value)))));

    private void OnDeviceLost(string id, VmmException reason) =>
        Broadcast(ExtensionPrefix + "DEVICE_LOST", new JsonObject { ["id"] = id, ["reason"] = VmmException.Describe(reason) });

    private void OnDeviceReturned(string id) => Broadcast(ExtensionPrefix + "DEVICE_RETURNED", new JsonObject { ["id"] = id });

    private void OnReset() =>
        Broadcast("RESET", new JsonObject { ["guest"] = false, ["reason"] = _resetting ? "host-qmp-system-reset" : "none" });

    private void OnMigrationStatus(MigrationStatus status)
    {
        if (_engine.Capabilities.IsOn(MigrationCapability.Events)) Broadcast("MIGRATION", new JsonObject { ["status"] = status.ToWireName() });
    }

    private void OnMigrationPass(long pass)
    {
        if (_engine.Capabilities.IsOn(MigrationCapability.Events)) Broadcast("MIGRATION_PASS", new JsonObject { ["pass"] = pass });
    }
}
