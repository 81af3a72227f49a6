using System.ComponentModel;
using System.Diagnostics;
using Vmm.Core.Errors;

namespace Vmm.Migration.Update;

/// <summary>The process that will take the VM over. Disposing this object leaves the process running.</summary>
internal sealed class NextProcess : IDisposable
{
    private readonly Process _process;

    private NextProcess(Process process)
    {
        _process = process;
        Exited = Exit();
    }

    internal int Pid => _process.Id;

    /// <summary>Completes with the exit code.</summary>
    internal Task<int> Exited { get; }

    /// <summary>Starts a program with this process's directory and environment.</summary>
    /// <param name="command">Program and arguments.</param>
    /// <param name="ticket">The ticket to put into its environment, or null.</param>
    /// <param name="quiet">True gives the program pipes that this process reads; false lets it inherit this process's streams.</param>
    /// <exception cref="ConfigurationException">The program cannot be started.</exception>
    internal static NextProcess Start(IReadOnlyList<string> command, UpdateTicket? ticket, bool quiet = false)
    {
        var info = new ProcessStartInfo(command[0], [.. command.Skip(1)]) { RedirectStandardInput = quiet, RedirectStandardOutput = quiet, RedirectStandardError = quiet };
        if (ticket is not null) info.Environment[UpdateTicket.Variable] = ticket.ToText();
        try
        {
            return new NextProcess(Process.Start(info)!);
        }
        catch (Win32Exception e)
        {
            throw new ConfigurationException($"update: cannot start '{command[0]}': {e.Message}", e);
        }
    }

    /// <summary>Runs a program to its end.</summary>
    /// <param name="command">Program and arguments.</param>
    /// <param name="ticket">The ticket to put into its environment.</param>
    /// <param name="limit">Ends the wait and the program.</param>
    /// <returns>Its exit code and what it wrote to stderr.</returns>
    /// <exception cref="ConfigurationException">The program cannot be started.</exception>
    /// <exception cref="OperationCanceledException">The program did not end in time and was killed.</exception>
    internal static async Task<(int ExitCode, string Errors)> RunAsync(IReadOnlyList<string> command, UpdateTicket ticket, CancellationToken limit)
    {
        using NextProcess next = Start(command, ticket, quiet: true);
        try
        {
            // Both pipes must be read, because a full one would block the program.
            Task<string> errors = next._process.StandardError.ReadToEndAsync(limit), output = next._process.StandardOutput.ReadToEndAsync(limit);
            int code = await next.Exited.WaitAsync(limit).ConfigureAwait(false);
            await output.ConfigureAwait(false);
            return (code, await errors.ConfigureAwait(false));
        }
        finally
        {
            next.End();
        }
    }

    /// <summary>Waits for <paramref name="happened"/> or for the end of the process, whichever comes first.</summary>
    /// <returns>The exit code if the process ended first, else null.</returns>
    /// <exception cref="OperationCanceledException">The time limit has passed.</exception>
    internal async Task<int?> EndsBefore(Task happened, CancellationToken limit)
    {
        await Task.WhenAny(happened, Exited).WaitAsync(limit).ConfigureAwait(false);
        if (!happened.IsCompleted) return await Exited.ConfigureAwait(false);
        await happened.ConfigureAwait(false);
        return null;
    }

    /// <summary>Kills the process and what it has started, such as the program of a script, unless it has ended; waits for its end.</summary>
    internal void End()
    {
        if (!_process.HasExited) _process.Kill(entireProcessTree: true);
        _process.WaitForExit();
    }

    public void Dispose() => _process.Dispose();

    private async Task<int> Exit()
    {
        await _process.WaitForExitAsync().ConfigureAwait(false);
        return _process.ExitCode;
    }
}
