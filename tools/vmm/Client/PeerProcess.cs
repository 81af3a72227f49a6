using System.Diagnostics;
using System.Reflection;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary>A child process, vmm or QEMU, that runs a VM, with a QMP session. Disposing it ends the process, if necessary by a kill.</summary>
internal sealed class PeerProcess : IAsyncDisposable
{
    private static readonly TimeSpan s_startDeadline = TimeSpan.FromSeconds(30), s_quitDeadline = TimeSpan.FromSeconds(5);
    private readonly Process _process;
    private readonly List<string> _errors = [];
    private readonly TaskCompletionSource<string> _ready = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private IMonitor? _monitor;

    private PeerProcess(ProcessStartInfo info)
    {
        info.RedirectStandardError = info.RedirectStandardInput = info.RedirectStandardOutput = true;
        _process = new Process { StartInfo = info, EnableRaisingEvents = true };
        _process.ErrorDataReceived += (_, e) => OnLine(e.Data);
        // Discard the output: a full pipe would block the process.
        _process.OutputDataReceived += static (_, _) => { };
        _process.Exited += (_, _) => _ready.TrySetException(new CliException(ExitCode.Failed, $"'{info.FileName}' ended before it was ready: {Errors}"));
        _process.Start();
        _process.BeginErrorReadLine();
        _process.BeginOutputReadLine();
    }

    public int Pid => _process.Id;

    public IMonitor Monitor => _monitor ?? throw new InvalidOperationException("not connected");

    /// <summary>The line with which <c>vmm run</c> reports that it is ready.</summary>
    public string ReadyLine => _ready.Task.Result;

    /// <summary>The address at which <c>vmm run</c> waits for a migration, from its ready line.</summary>
    public string IncomingUri => ReadyLine[(ReadyLine.LastIndexOf(", incoming ", StringComparison.Ordinal) + ", incoming ".Length)..];

    public string Errors
    {
        get { lock (_errors) return string.Join("; ", _errors); }
    }

    /// <summary>Completes with the process's exit code.</summary>
    public async Task<int> WaitForExit(CancellationToken cancel)
    {
        await _process.WaitForExitAsync(cancel);
        return _process.ExitCode;
    }

    /// <summary>
    /// Starts <c>vmm run</c> with these arguments and a socket at <paramref name="qmpPath"/>, and waits for its ready line. Its VM directory and its
    /// temporary files are in <paramref name="runtimeDirectory"/>, so that the user's own directory stays unchanged.
    /// </summary>
    public static async Task<PeerProcess> StartVmm(CliContext context, string runtimeDirectory, string qmpPath, IReadOnlyList<string> arguments, TimeSpan? deadline = null)
    {
        TimeSpan limit = deadline ?? s_startDeadline;
        (string file, string[] prefix) = Self();
        var info = new ProcessStartInfo(file);
        foreach (string one in prefix.Concat(["run", "--qmp", qmpPath]).Concat(arguments)) info.ArgumentList.Add(one);
        // TMPDIR too, because .NET puts its diagnostic sockets there, and a killed process leaves them.
        info.Environment["XDG_RUNTIME_DIR"] = info.Environment["TMPDIR"] = runtimeDirectory;
        var peer = new PeerProcess(info);
        try
        {
            await peer._ready.Task.WaitAsync(limit, context.Interrupted);
            peer._monitor = await context.Connect(qmpPath, context.Interrupted);
            return peer;
        }
        catch (Exception e)
        {
            await peer.DisposeAsync();
            if (e is TimeoutException) throw new CliException(ExitCode.Timeout, $"'{file}' was not ready within {limit.TotalSeconds:0} s: {peer.Errors}", e);
            throw;
        }
    }

    /// <summary>Starts a QEMU and waits until its QMP socket answers.</summary>
    public static async Task<PeerProcess> StartQemu(CliContext context, string binary, string qmpPath, IReadOnlyList<string> arguments)
    {
        var peer = new PeerProcess(new ProcessStartInfo(binary, [.. arguments, "-qmp", $"unix:{qmpPath},server=on,wait=on"]));
        try
        {
            long start = Stopwatch.GetTimestamp();
            while (true)
            {
                try
                {
                    peer._monitor = await context.Connect(qmpPath, context.Interrupted);
                    return peer;
                }
                catch (CliException e) when (e.Code == ExitCode.Unreachable && !peer._process.HasExited && Stopwatch.GetElapsedTime(start) < s_startDeadline)
                {
                    // QEMU does not report when it has made its socket, so poll.
                    await Task.Delay(20, context.Interrupted);
                }
                catch (CliException e) when (peer._process.HasExited)
                {
                    throw new CliException(ExitCode.Failed, $"'{binary}' ended: {peer.Errors}", e);
                }
            }
        }
        catch
        {
            await peer.DisposeAsync();
            throw;
        }
    }

    public async ValueTask DisposeAsync()
    {
        try
        {
            if (_monitor is not null && !_process.HasExited)
            {
                using var limit = new CancellationTokenSource(s_quitDeadline);
                await _monitor.Execute("quit", null, limit.Token);
                await _process.WaitForExitAsync(limit.Token);
            }
        }
        catch (Exception e) when (e is CliException or MonitorException or OperationCanceledException)
        {
            // The process has ended or does not answer; the kill below ends it for certain.
        }
        finally
        {
            if (_monitor is not null) await _monitor.DisposeAsync();
            if (!_process.HasExited)
            {
                _process.Kill();
                await _process.WaitForExitAsync(CancellationToken.None);
            }
            _process.Dispose();
        }
    }

    /// <summary>How to start this program again: directly, or through <c>dotnet</c> if that runs it.</summary>
    internal static (string File, string[] Prefix) Self()
    {
        string? process = Environment.ProcessPath;
        string assembly = Assembly.GetExecutingAssembly().Location;
        string beside = Path.Combine(AppContext.BaseDirectory, "vmm");
        if (process is not null && Path.GetFileName(process) == "vmm") return (process, []);
        return File.Exists(beside) ? (beside, []) : (process ?? "dotnet", [assembly]);
    }

    private void OnLine(string? line)
    {
        if (line is null) return;
        lock (_errors)
        {
            _errors.Add(line);
            if (_errors.Count > 20) _errors.RemoveAt(0);
        }
        if (line.StartsWith("vmm: ready: ", StringComparison.Ordinal)) _ready.TrySetResult(line);
    }
}
