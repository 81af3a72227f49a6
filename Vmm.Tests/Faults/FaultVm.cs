using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Faults;

/// <summary>One line of a VM's log, or one of its events.</summary>
internal readonly record struct LogLine(DateTimeOffset At, string Text);

/// <summary>
/// A process that runs a VM: its log, its events with their times, and what it held open when it was last idle. It outlives an attempt as long as it is able to.
/// </summary>
internal sealed class FaultVm : IAsyncDisposable
{
    private const int MaxLines = 400, Learned = 2;
    private static readonly TimeSpan s_start = TimeSpan.FromSeconds(60), s_quit = TimeSpan.FromSeconds(10);

    private readonly Process? _process;
    private readonly OwnedFd? _pidFd;
    private readonly LogBook _log;
    private readonly List<LogLine> _events = [];
    private readonly Dictionary<string, (int Looks, List<string> Held)> _idle = [];
    private QmpClient? _qmp;
    private bool _disposed;
    private TaskCompletionSource _changed = new(TaskCreationOptions.RunContinuationsAsynchronously);

    private FaultVm(string name, string qmpPath, Process? process, int pid, LogBook log)
    {
        (Name, QmpPath, _process, Pid, _log) = (name, qmpPath, process, pid, log);
        log.Enter();
        _pidFd = Posix.OpenProcess(pid, out _);
    }

    internal string Name { get; }

    internal string QmpPath { get; }

    internal int Pid { get; }

    /// <summary>The address at which it waits, from its ready line; empty if it does not.</summary>
    internal string IncomingUri { get; private set; } = "";

    /// <summary>Attempts that this process has been part of.</summary>
    internal int Attempts { get; set; }

    /// <summary>True while the process has not ended.</summary>
    internal bool IsAlive => _pidFd is { IsClosed: false } && Posix.Poll(_pidFd, Posix.POLLIN, null, 0, out _) == 0;

    /// <summary>The exit code of a process that this one started and that has ended; null for others.</summary>
    internal int? ExitCode => _process is { HasExited: true } ? _process.ExitCode : null;

    /// <summary>Starts a program of the project.</summary>
    /// <param name="folder">Holds its VM directory and its temporary files.</param>
    /// <param name="arguments">Arguments of <c>vmm</c>.</param>
    internal static ProcessStartInfo Command(string folder, IEnumerable<string> arguments)
    {
        (string file, string[] prefix) = PeerProcess.Self();
        var info = new ProcessStartInfo(file, [.. prefix, .. arguments]) { RedirectStandardError = true, RedirectStandardOutput = true, RedirectStandardInput = true };
        info.Environment["XDG_RUNTIME_DIR"] = info.Environment["TMPDIR"] = folder;
        return info;
    }

    /// <summary>The same command, begun by a shell's script that must end in <c>exec "$@"</c>.</summary>
    private static ProcessStartInfo Through(ProcessStartInfo command, string script)
    {
        string[] whole = ["-c", script, "sh", command.FileName, .. command.ArgumentList];
        command.FileName = "sh";
        command.ArgumentList.Clear();
        foreach (string one in whole) command.ArgumentList.Add(one);
        return command;
    }

    /// <summary>Starts <c>vmm run</c> and waits until it is ready.</summary>
    /// <param name="folder">Holds its VM directory and its temporary files.</param>
    /// <param name="name">Its name.</param>
    /// <param name="arguments">Arguments of <c>vmm run</c> beside the name.</param>
    /// <param name="mayBeLimited">True if a limit on the size of its files must show as an error of a write, not as a signal that ends it.</param>
    internal static async Task<FaultVm> Start(string folder, string name, IEnumerable<string> arguments, bool mayBeLimited = false)
    {
        string qmp = Path.Combine(folder, "vmm", $"{name}.qmp");
        ProcessStartInfo info = Command(folder, ["-v", "run", "--name", name, .. arguments]);
        if (mayBeLimited) info = Through(info, "trap '' XFSZ; exec \"$@\"");
        var log = new LogBook();
        var ready = new TaskCompletionSource<string>(TaskCreationOptions.RunContinuationsAsynchronously);
        var process = new Process { StartInfo = info, EnableRaisingEvents = true };
        process.OutputDataReceived += static (_, _) => { };
        process.ErrorDataReceived += (_, e) =>
        {
            if (e.Data is not { } line) return;
            log.Add(line);
            if (line.StartsWith("vmm: ready: ", StringComparison.Ordinal)) ready.TrySetResult(line);
        };
        process.Exited += (_, _) => ready.TrySetException(new InvalidOperationException($"vmm run --name {name} ended before it was ready:\n{log.Tail(20)}"));
        process.Start();
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
        var vm = new FaultVm(name, qmp, process, process.Id, log);
        try
        {
            string line = await ready.Task.WaitAsync(s_start);
            int at = line.LastIndexOf(", incoming ", StringComparison.Ordinal);
            if (at >= 0) vm.IncomingUri = line[(at + ", incoming ".Length)..];
            await vm.Connect();
            return vm;
        }
        catch
        {
            await vm.DisposeAsync();
            throw;
        }
    }

    /// <summary>The process that an update has moved the VM to; it writes to the same pipe as the one before.</summary>
    /// <param name="pid">The process.</param>
    /// <param name="patience">How long it may take until it listens.</param>
    /// <param name="qmpPath">Where it listens; by default at the VM's place.</param>
    internal async Task<FaultVm> Successor(int pid, TimeSpan patience, string? qmpPath = null)
    {
        var next = new FaultVm(Name, qmpPath ?? Path.Combine(Path.GetDirectoryName(QmpPath)!, $"{Name}.qmp"), null, pid, _log);
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            try
            {
                await next.Connect();
                return next;
            }
            catch (Exception e) when (e is VmmException or TimeoutException)
            {
                next._qmp?.Dispose();
                if (next.IsAlive && Stopwatch.GetElapsedTime(start) < patience)
                {
                    await next.Changed(20);
                    continue;
                }
                next.Leave();
                throw;
            }
        }
    }

    /// <summary>Runs a command; throws <see cref="TimeoutException"/> when no answer comes in time.</summary>
    internal async Task<JsonNode?> Execute(string command, JsonObject? arguments = null, TimeSpan? deadline = null)
    {
        using var limit = new CancellationTokenSource(deadline ?? TimeSpan.FromSeconds(10));
        try
        {
            return await _qmp!.ExecuteAsync(command, arguments, cancel: limit.Token);
        }
        catch (OperationCanceledException e)
        {
            throw new TimeoutException($"{Name} did not answer '{command}'", e);
        }
    }

    /// <summary>Runs a query whose failure says nothing; null if the VM does not answer.</summary>
    internal async Task<JsonNode?> Ask(string command, JsonObject? arguments = null, int deadlineMs = 2000)
    {
        if (!IsAlive || _qmp is null) return null;
        try
        {
            return await Execute(command, arguments, TimeSpan.FromMilliseconds(deadlineMs));
        }
        catch (Exception e) when (e is TimeoutException or VmmException)
        {
            return null;
        }
    }

    /// <summary>The run state; <c>dead</c> or <c>silent</c> if it does not answer.</summary>
    internal async Task<string> State() => IsAlive ? (await Ask("query-status"))?["status"]?.ToString() ?? (IsAlive ? "silent" : "dead") : "dead";

    /// <summary>The status of its migration, <c>none</c> if there was none.</summary>
    internal async Task<string> MigrationStatus() => IsAlive ? (await Ask("query-migrate")) is { } answer ? answer["status"]?.ToString() ?? "none" : "silent" : "dead";

    /// <summary>The number of events so far; a mark for <see cref="EventsSince"/>.</summary>
    internal int EventCount
    {
        get { lock (_events) return _events.Count; }
    }

    /// <summary>The events from a mark on: a name, and for migrations the status behind it.</summary>
    internal List<LogLine> EventsSince(int mark)
    {
        lock (_events) return _events.GetRange(mark, _events.Count - mark);
    }

    /// <summary>Waits for the next event, the end of the process, or the end of a short time.</summary>
    internal async Task Changed(int atMostMs)
    {
        Task changed;
        lock (_events) changed = _changed.Task;
        try
        {
            await changed.WaitAsync(TimeSpan.FromMilliseconds(atMostMs));
        }
        catch (TimeoutException)
        {
            // The caller looks again.
        }
    }

    /// <summary>Waits until the process has ended.</summary>
    /// <returns>False if it lives on.</returns>
    internal bool WaitForEnd() => !IsAlive || Posix.Poll(_pidFd!, Posix.POLLIN, null, (int)s_quit.TotalMilliseconds, out _) != 0;

    internal void Signal(int number)
    {
        if (IsAlive) Posix.Kill(Pid, number);
    }

    /// <summary>
    /// Compares what the process holds open, and its threads, with earlier idle moments in the same role. The first two attempts teach what it keeps: compiled code,
    /// threads of the pool, and the last attempt itself, whose descriptors depend on how far it came.
    /// </summary>
    /// <returns>What is there that was not there before; null if nothing is.</returns>
    internal string? FindLeak(string role)
    {
        List<string> now = Held();
        if (!_idle.TryGetValue(role, out (int Looks, List<string> Held) known)) known = (0, []);
        if (known.Looks < Learned)
        {
            _idle[role] = (known.Looks + 1, [.. known.Held, .. Without(now, known.Held)]);
            return null;
        }
        List<string> more = [];
        // A thread closes its last descriptors a moment after the state that it reported.
        SpinWait.SpinUntil(() => (more = Without(Held(), known.Held)).Count == 0, TimeSpan.FromSeconds(5));
        if (more.Count == 0) return null;
        _idle[role] = (Learned, [.. known.Held, .. more]); // Reported once.
        return $"{Name} ({role}, pid {Pid}) holds more than before: {string.Join(", ", more.Order())}";
    }

    /// <summary>Resident memory of the process, the guest's RAM with it.</summary>
    internal long ResidentBytes() => File.ReadLines($"/proc/{Pid}/status").First(static l => l.StartsWith("VmRSS:", StringComparison.Ordinal))
        .Split(' ', StringSplitOptions.RemoveEmptyEntries) is [_, var kib, ..] ? long.Parse(kib) << 10 : 0;

    internal string Log(int lines = 60) => _log.Tail(lines);

    /// <summary>Ends the process by <c>quit</c>.</summary>
    /// <returns>What was wrong; null if it ended well.</returns>
    internal async Task<string?> Quit()
    {
        if (!IsAlive) return null;
        await Ask("quit");
        if (Posix.Poll(_pidFd!, Posix.POLLIN, null, (int)s_quit.TotalMilliseconds, out _) == 0) return $"{Name} does not end after quit";
        // Not WaitForExitAsync, which waits for the end of the pipe, and a successor has the pipe too.
        if (_process is null || !_process.WaitForExit(s_quit)) return null;
        return _process.ExitCode == 0 ? null : $"{Name} ended with exit code {_process.ExitCode} after quit";
    }

    public ValueTask DisposeAsync()
    {
        if (_disposed) return ValueTask.CompletedTask;
        _disposed = true;
        if (IsAlive)
        {
            Posix.Kill(Pid, 18);
            Posix.Kill(Pid, 9);
            Posix.Poll(_pidFd!, Posix.POLLIN, null, (int)s_quit.TotalMilliseconds, out _);
        }
        Leave();
        return ValueTask.CompletedTask;
    }

    /// <summary>Gives up what this object has; the process may live on, and another object has it then.</summary>
    internal void Leave()
    {
        if (!IsAlive) _process?.WaitForExit(s_quit);
        _disposed = true;
        _qmp?.Dispose();
        _pidFd?.Dispose();
        _log.Leave(_process);
    }

    private async Task Connect()
    {
        // Blocks until the greeting, which arrives on a thread of the pool.
        _qmp = await Task.Factory.StartNew(() => QmpClient.Connect(QmpPath, s_start), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default);
        _qmp.EventReceived += OnEvent;
        _ = _qmp.Closed.ContinueWith(_ => Wake(), TaskScheduler.Default);
        await Execute("migrate-set-capabilities", Capabilities(("events", true)));
    }

    /// <summary>The argument of migrate-set-capabilities.</summary>
    internal static JsonObject Capabilities(params ReadOnlySpan<(string Name, bool On)> changes)
    {
        var list = new JsonArray();
        foreach ((string name, bool on) in changes) list.Add(new JsonObject { ["capability"] = name, ["state"] = on });
        return new JsonObject { ["capabilities"] = list };
    }

    private void OnEvent(QmpEvent one)
    {
        string text = one.Data["status"] is { } status ? $"{one.Name} {status}" : one.Name;
        lock (_events) _events.Add(new LogLine(one.Timestamp ?? DateTimeOffset.UtcNow, text));
        Wake();
    }

    private void Wake()
    {
        lock (_events)
        {
            _changed.TrySetResult();
            _changed = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        }
    }

    private List<string> Held() =>
        [.. LeakCheck.Descriptors(Pid).Select(static d => d.Split('[')[0] is var kind && kind.EndsWith(':') && !d.StartsWith("anon", StringComparison.Ordinal) ? kind : d),
         .. LeakCheck.ThreadNames(Pid).Select(static t => t.Name).Where(static n => n.Length > 0 && !n.StartsWith(".NET", StringComparison.Ordinal) && n is not ("vmm" or "dotnet")).Select(static n => $"thread {n}")];

    private static List<string> Without(List<string> all, List<string> known)
    {
        var left = new List<string>(all);
        foreach (string one in known) left.Remove(one);
        return left;
    }

    /// <summary>The last lines that the processes of one VM have written.</summary>
    private sealed class LogBook
    {
        private readonly Queue<string> _lines = new();
        private readonly List<Process> _ended = [];
        private int _users;

        internal void Enter() => Interlocked.Increment(ref _users);

        /// <summary>Closes the pipe when nobody writes to it any more: an open pipe without a reader would end the writer.</summary>
        internal void Leave(Process? process)
        {
            lock (_ended)
            {
                if (process is not null) _ended.Add(process);
                if (Interlocked.Decrement(ref _users) == 0) _ended.ForEach(static p => p.Dispose());
            }
        }

        internal void Add(string line)
        {
            lock (_lines)
            {
                _lines.Enqueue(line);
                if (_lines.Count > MaxLines) _lines.Dequeue();
            }
        }

        internal string Tail(int lines)
        {
            lock (_lines) return string.Join('\n', _lines.TakeLast(lines));
        }
    }
}
