using System.ComponentModel;
using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Tools.Cli.Demo;
using Vmm.Tools.Cli.Registry;

namespace Vmm.Tools.Cli.Hosting;
using Nito.AsyncEx.Synchronous;

/// <summary>The process that is to take a VM over; has this one's streams, directory and environment. Disposing it leaves it running.</summary>
internal sealed class NextProcess : IDisposable
{
    private const int PollMs = 5;
    private readonly Process _process;

    private NextProcess(Process process) => _process = process;

    public int Pid => _process.Id;

    /// <summary>Program and first arguments of a new <c>vmm</c>.</summary>
    /// <param name="binary">A program, or an assembly for <c>dotnet</c>; null for this one.</param>
    public static string[] Program(string? binary)
    {
        (string file, string[] prefix) = binary is null ? PeerProcess.Self()
            : Path.GetExtension(binary) == ".dll" ? ("dotnet", [Path.GetFullPath(binary)]) : (Path.GetFullPath(binary), []);
        return [file, .. prefix];
    }

    /// <summary>Starts it; quiet, its streams are this process's to read.</summary>
    /// <exception cref="ConfigurationException">The program cannot be started.</exception>
    public static NextProcess Start(string? binary, IReadOnlyList<string> arguments, bool quiet = false)
    {
        string[] program = Program(binary);
        try
        {
            var info = new ProcessStartInfo(program[0], [.. program[1..], .. arguments]) { RedirectStandardInput = quiet, RedirectStandardOutput = quiet, RedirectStandardError = quiet };
            return new NextProcess(Process.Start(info)!);
        }
        catch (Win32Exception e)
        {
            throw new ConfigurationException($"update: cannot start '{program[0]}': {e.Message}", e);
        }
    }

    /// <summary>
    /// Has a program read a VM's options, before a process replaces itself by it: from that there is no way back. With `--device help` a `vmm`
    /// reads all of them, makes nothing, and ends.
    /// </summary>
    /// <param name="binary">As for <see cref="Program"/>.</param>
    /// <param name="arguments">The options.</param>
    /// <param name="meanwhile">What can be done while it starts.</param>
    /// <param name="limit">Ends the wait, and the program.</param>
    /// <exception cref="ConfigurationException">The program cannot be started.</exception>
    /// <exception cref="MigrationFailedException">It does not take them, and what it said.</exception>
    /// <exception cref="OperationCanceledException">Out of time.</exception>
    public static void Try(string? binary, IReadOnlyList<string> arguments, Action meanwhile, CancellationToken limit)
    {
        using NextProcess next = Start(binary, [.. arguments, "--device", "help"], quiet: true);
        try
        {
            Task<string> errors = next._process.StandardError.ReadToEndAsync(limit), output = next._process.StandardOutput.ReadToEndAsync(limit);
            meanwhile();
            next._process.WaitForExitAsync(limit).WaitAndUnwrapException(limit);
            if (next._process.ExitCode != 0)
                throw new MigrationFailedException($"update failed, the VM goes on in process {Environment.ProcessId}: '{binary ?? "vmm"}' does not take its options, exit code {next._process.ExitCode}: {errors.WaitAndUnwrapException(CancellationToken.None).Trim()}");
            output.WaitAndUnwrapException(CancellationToken.None);
        }
        finally
        {
            next.End();
        }
    }

    /// <summary>Waits until it listens.</summary>
    /// <exception cref="MigrationFailedException">It ended instead.</exception>
    /// <exception cref="OperationCanceledException">Out of time.</exception>
    public void WaitForSocket(string path, CancellationToken limit)
    {
        while (!File.Exists(path))
        {
            limit.ThrowIfCancellationRequested();
            if (WaitForExit(TimeSpan.FromMilliseconds(PollMs)) is { } code)
                throw new MigrationFailedException($"update failed, the VM goes on in process {Environment.ProcessId}: the new process ended with exit code {code} before it was ready");
        }
    }

    /// <summary>Waits until the VM's name is its own.</summary>
    /// <exception cref="MigrationFailedException">It has the VM but not the name.</exception>
    public VmEntry WaitForTakeOver(VmDirectory directory, TimeSpan limit)
    {
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            if (directory.FindPid(Pid) is { } entry) return entry;
            if (WaitForExit(TimeSpan.FromMilliseconds(PollMs)) is { } code) throw new MigrationFailedException($"update: the new process took the VM over and ended with exit code {code}");
            if (Stopwatch.GetElapsedTime(start) > limit) throw new MigrationFailedException($"update: process {Pid} has the VM but did not take over its name within {limit.TotalSeconds:0} s");
        }
    }

    /// <summary>Calls back when it ends, at once when it has.</summary>
    /// <returns>Dispose to forget.</returns>
    public IDisposable OnExit(Action ended)
    {
        var forget = new CancellationTokenSource();
        _ = _process.WaitForExitAsync(forget.Token).ContinueWith(_ => ended(), CancellationToken.None, TaskContinuationOptions.OnlyOnRanToCompletion, TaskScheduler.Default);
        return new Forget(forget);
    }

    /// <summary>Its exit code, or null while it runs.</summary>
    public int? WaitForExit(TimeSpan limit) => _process.WaitForExit(limit) ? _process.ExitCode : null;

    /// <summary>Ends it by force.</summary>
    public void End()
    {
        if (!_process.HasExited) _process.Kill();
        _process.WaitForExit();
    }

    public void Dispose() => _process.Dispose();

    private sealed class Forget(CancellationTokenSource source) : IDisposable
    {
        public void Dispose()
        {
            source.Cancel();
            source.Dispose();
        }
    }
}
