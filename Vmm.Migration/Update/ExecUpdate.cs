using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;

namespace Vmm.Migration.Update;

/// <summary>One update by cpr-exec: the process replaces itself. It tries the new program first, because it cannot go back after the exec.</summary>
internal sealed class ExecUpdate(Vm vm, IMigrationEngine engine, UpdateOptions options, UpdateFolder folder)
{
    /// <summary>Does not return if the update succeeds.</summary>
    /// <returns>Why it failed; the VM is unchanged.</returns>
    /// <exception cref="VmmException">The program did not start, its trial failed, or the migration was refused; the VM is unchanged.</exception>
    internal async Task<MigrationFailedException> RunAsync(Func<Task> rehearse, CancellationToken limit)
    {
        await Try(rehearse, limit).ConfigureAwait(false);
        limit.ThrowIfCancellationRequested();
        var channels = new UpdateChannels(Environment.ProcessId, new MigrationAddress { Transport = MigrationTransport.File, Path = folder.Claim(".state") }, null);
        var ticket = new UpdateTicket { Channels = channels, RemoveDirectory = folder.Temporary };
        using BorrowedSettings settings = BorrowedSettings.Take(engine, MigrationMode.CprExec, returnPath: false, options.Command(channels));
        void Note(RunState from, RunState to)
        {
            if (RunStateTable.IsRunning(from)) Tell(ticket with { StoppedAtNs = MonotonicClock.NowNs });
        }

        try
        {
            // The new program inherits this process's environment, so the ticket goes there.
            Tell(ticket);
            vm.RunState.Changed += Note;
            await engine.Migrate(channels.Main).ConfigureAwait(false);
            return new MigrationFailedException(TransferUpdate.Failed($"{engine.Query().Error}"));
        }
        finally
        {
            vm.RunState.Changed -= Note;
            Tell(null);
        }
    }

    private async Task Try(Func<Task> rehearse, CancellationToken limit)
    {
        if (options.TrialArguments is null)
        {
            await rehearse().ConfigureAwait(false);
            return;
        }
        IReadOnlyList<string> command = options.TrialCommand();
        Task<(int ExitCode, string Errors)> trial = NextProcess.RunAsync(command, limit);
        // Rehearse while the program starts, which takes longer.
        if (!trial.IsFaulted) await rehearse().ConfigureAwait(false);
        (int code, string errors) = await trial.ConfigureAwait(false);
        if (code != 0) throw new MigrationFailedException(TransferUpdate.Failed($"'{command[0]}' refuses its arguments, exit code {code}: {errors.Trim()}"));
    }

    private static void Tell(UpdateTicket? ticket) => Environment.SetEnvironmentVariable(UpdateTicket.Variable, ticket?.ToText());
}
