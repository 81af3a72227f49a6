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
    private static readonly TimeSpan s_reading = TimeSpan.FromSeconds(2);

    /// <summary>Does not return if the update succeeds.</summary>
    /// <returns>Why it failed; the VM is unchanged.</returns>
    /// <exception cref="VmmException">The program did not start, its trial failed, or the migration was refused; the VM is unchanged.</exception>
    internal async Task<MigrationFailedException> RunAsync(Func<Task> rehearse, CancellationToken limit)
    {
        await Try(rehearse, limit).ConfigureAwait(false);
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
            limit.ThrowIfCancellationRequested();
            Task moving = engine.Migrate(channels.Main);
            using (limit.Register(engine.Cancel)) await moving.ConfigureAwait(false);
            limit.ThrowIfCancellationRequested();
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
        string word = Guid.NewGuid().ToString("N"), reportPath = folder.Claim(".report");
        using var reports = new UpdateReports(reportPath);
        Task<(int ExitCode, string Errors)> trial = NextProcess.RunAsync(command, new UpdateTicket
        {
            Channels = new UpdateChannels(Environment.ProcessId, new MigrationAddress { Transport = MigrationTransport.File, Path = reportPath }, null),
            ReportPath = reportPath, TrialWord = word, Sections = Sections(),
        }, limit);
        // Rehearse while the program starts, which takes longer.
        if (!trial.IsFaulted) await rehearse().ConfigureAwait(false);
        (int code, string errors) = await trial.ConfigureAwait(false);
        if (code != 0) throw new MigrationFailedException(TransferUpdate.Failed($"'{command[0]}' refuses its arguments, exit code {code}: {errors.Trim()}"));
        // Any program can end with 0. After the exec there is no way back, so this one must have said that it can load a VM.
        if (!await Proves(reports, word, limit).ConfigureAwait(false))
            throw new MigrationFailedException(TransferUpdate.Failed($"'{command[0]}' ended with exit code 0 but did not prove that it can take the VM")) { Hint = "is it a vmm of this version or later?" };
    }

    private string Sections()
    {
        using (vm.Bql.Acquire())
            return string.Join(';', vm.SaveVm.Entries().Select(static e => e.VmState).OfType<IVmStateSection>().Select(static s => $"{s.Name} {s.VersionId}").Distinct());
    }

    private static async Task<bool> Proves(UpdateReports reports, string word, CancellationToken limit)
    {
        try
        {
            // The report was sent before the program ended; it only has to be read.
            return await reports.Tried.WaitAsync(s_reading, limit).ConfigureAwait(false) == word;
        }
        catch (TimeoutException)
        {
            return false;
        }
    }

    private static void Tell(UpdateTicket? ticket) => Environment.SetEnvironmentVariable(UpdateTicket.Variable, ticket?.ToText());
}
