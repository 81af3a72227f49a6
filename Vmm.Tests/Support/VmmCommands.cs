using System.Diagnostics;
using System.Text;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Support;

/// <summary>Runs the real <c>vmm</c> program with a private VM directory. Dispose ends VMs that still run.</summary>
internal sealed class VmmCommands : IAsyncDisposable
{
    internal static readonly TimeSpan Deadline = TimeSpan.FromSeconds(60);
    private readonly TempDirectory _folder = new();
    private readonly List<PeerProcess> _vms = [];
    private readonly List<Running> _started = [];
    private readonly CliContext _context;

    internal VmmCommands() => _context = new()
    {
        Out = TextWriter.Null, Error = TextWriter.Null,
        Connect = (path, cancel) => StartDeadline is { } slow ? QmpMonitor.Connect(path, slow, cancel) : QmpMonitor.Connect(path, cancel),
    };

    /// <summary>Limit on the start of a VM; null for the command's own limit.</summary>
    internal TimeSpan? StartDeadline { get; init; }

    /// <summary>Limit on the run time of a command.</summary>
    internal TimeSpan CommandDeadline { get; init; } = Deadline;

    internal string this[string name] => _folder[name];

    /// <summary>Names of the files in the VM directory, without the lock file.</summary>
    internal IEnumerable<string?> Registered => Directory.EnumerateFileSystemEntries(_folder["vmm"]).Select(Path.GetFileName).Where(static n => n != ".lock").Order();

    /// <summary>Starts a VM called <paramref name="name"/> with its QMP socket at the default path.</summary>
    internal Task<PeerProcess> StartVm(string name, params string[] arguments) => StartVmOf(name, "64M", arguments);

    /// <summary>As <see cref="StartVm"/>, with another size of RAM.</summary>
    internal async Task<PeerProcess> StartVmOf(string name, string memory, params string[] arguments)
    {
        PeerProcess vm = await PeerProcess.StartVmm(_context, _folder.Path, _folder[$"vmm/{name}.qmp"],
            ["--name", name, "--memory", memory, "--snapshot-dir", _folder[$"snapshots-{name}"], .. arguments], StartDeadline);
        _vms.Add(vm);
        return vm;
    }

    /// <summary>Runs a command to its end.</summary>
    internal async Task<CliResult> Run(params string[] arguments)
    {
        using Running command = Start(arguments);
        return await command.Finish();
    }

    /// <summary>Runs a command and expects it to succeed.</summary>
    internal async Task<string> Ok(params string[] arguments)
    {
        CliResult result = await Run(arguments);
        Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), $"vmm {string.Join(' ', arguments)}: {result.Error}");
        return result.Out;
    }

    /// <summary>Starts a command.</summary>
    internal Running Start(params string[] arguments) => StartIn(null, arguments);

    /// <summary>Starts a command with another temp directory.</summary>
    internal Running StartIn(string? temp, params string[] arguments)
    {
        (string file, string[] prefix) = PeerProcess.Self();
        return Start(temp, file, [.. prefix, .. arguments]);
    }

    /// <summary>Starts a command through a shell script. The script gets the command line as its arguments and must end in <c>exec "$@"</c>.</summary>
    /// <param name="shell">The shell and the programs that start it, e.g. <c>sh</c>.</param>
    /// <param name="script">The script.</param>
    /// <param name="arguments">The command's arguments.</param>
    internal Running StartThrough(IReadOnlyList<string> shell, string script, params string[] arguments)
    {
        (string file, string[] prefix) = PeerProcess.Self();
        return Start(null, shell[0], [.. shell.Skip(1), "-c", script, "sh", file, .. prefix, .. arguments]);
    }

    private Running Start(string? temp, string file, string[] arguments)
    {
        var info = new ProcessStartInfo(file, arguments) { RedirectStandardError = true, RedirectStandardOutput = true, RedirectStandardInput = true };
        info.Environment["XDG_RUNTIME_DIR"] = _folder.Path;
        info.Environment["TMPDIR"] = temp ?? _folder.Path;
        var running = new Running(Process.Start(info)!, CommandDeadline);
        lock (_started) _started.Add(running);
        return running;
    }

    /// <summary>The VM's run state.</summary>
    internal async Task<string> State(PeerProcess vm) => (await vm.Monitor.Execute("query-status", null, CancellationToken.None))!["status"]!.ToString();

    public async ValueTask DisposeAsync()
    {
        EndUpdated();
        foreach (PeerProcess vm in _vms) await vm.DisposeAsync();
        // A test need not end the commands that it started, such as device servers.
        foreach (Running one in _started) one.Dispose();
        _folder.Dispose();
    }

    /// <summary>Kills VMs that an update moved to another process. No object owns that process, but the private VM directory has its pid.</summary>
    private void EndUpdated()
    {
        if (!Directory.Exists(_folder["vmm"])) return;
        foreach (string file in Directory.EnumerateFiles(_folder["vmm"], "*.json"))
        {
            try
            {
                int pid = System.Text.Json.Nodes.JsonNode.Parse(File.ReadAllText(file))!["Pid"]!.GetValue<int>();
                if (!_vms.Exists(v => v.Pid == pid)) Posix.Kill(pid, 9);
            }
            catch (FileNotFoundException)
            {
                // A VM that has removed its entry is about to end.
            }
        }
    }

    /// <summary>A running command.</summary>
    internal sealed class Running : IDisposable
    {
        private readonly Process _process;
        private readonly TimeSpan _deadline;
        private readonly Task<string> _output;
        private readonly StringBuilder _errors = new();
        private bool _disposed;
        private readonly List<(Func<string, bool> Matches, TaskCompletionSource Seen)> _waiting = [];

        internal Running(Process process, TimeSpan deadline)
        {
            (_process, _deadline) = (process, deadline);
            _output = process.StandardOutput.ReadToEndAsync();
            process.ErrorDataReceived += (_, e) => OnError(e.Data);
            process.BeginErrorReadLine();
        }

        internal int Pid => _process.Id;

        internal void Signal(int number) => Posix.Kill(_process.Id, number);

        /// <summary>Waits for a line on stderr that contains a text.</summary>
        internal async Task Line(string part, TimeSpan? deadline = null)
        {
            try
            {
                await Seen(part).WaitAsync(deadline ?? Deadline);
            }
            catch (TimeoutException)
            {
                lock (_errors) Assert.Fail($"'{part}' did not appear on stderr: {_errors}");
            }
        }

        private Task Seen(string part)
        {
            var seen = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            lock (_errors)
            {
                if (_errors.ToString().Contains(part, StringComparison.Ordinal)) return Task.CompletedTask;
                _waiting.Add((l => l.Contains(part, StringComparison.Ordinal), seen));
            }
            return seen.Task;
        }

        internal async Task<CliResult> Finish(TimeSpan? deadline = null)
        {
            using var limit = new CancellationTokenSource(deadline ?? _deadline);
            await _process.WaitForExitAsync(limit.Token);
            string output = await _output;
            lock (_errors) return new CliResult((ExitCode)_process.ExitCode, output, _errors.ToString());
        }

        public void Dispose()
        {
            if (_disposed) return;
            _disposed = true;
            if (!_process.HasExited)
            {
                _process.Kill();
                _process.WaitForExit();
            }
            _process.Dispose();
        }

        private void OnError(string? line)
        {
            if (line is null) return;
            lock (_errors)
            {
                _errors.Append(line).Append('\n');
                foreach ((Func<string, bool> matches, TaskCompletionSource seen) in _waiting)
                    if (matches(line)) seen.TrySetResult();
            }
        }
    }
}
