using System.Diagnostics;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Qmp;
using Vmm.Migration.State;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>
/// Carries this process's VM into a new one: starts it, hands over by cpr-transfer, waits until it has the VM. Whatever fails before it has
/// confirmed, the VM goes on here and the new process is ended. One update at a time.
/// </summary>
internal sealed class VmUpdater(CliContext context, VmDirectory directory, VmRegistration registration, Vm vm, Action rehearse)
{
    /// <summary>For the name and the socket, after the VM has moved: a few file operations.</summary>
    private static readonly TimeSpan s_takeOver = TimeSpan.FromSeconds(60);

    /// <summary>For a process that has gone wrong to end, so that the user learns how.</summary>
    private static readonly TimeSpan s_lastWord = TimeSpan.FromSeconds(2);

    private static readonly string[] s_perProcess = ["--incoming", "--replaces"], s_flags = ["--paused", "-S"];

    private int _underWay;

    /// <summary>One update, from the answerer's thread.</summary>
    /// <exception cref="VmmException">It failed, and why; the VM is as before.</exception>
    public VmUpdateResult Update(VmUpdateRequest request)
    {
        // Two would share sockets, and one's clean-up would hit the other's.
        if (Interlocked.Exchange(ref _underWay, 1) != 0) throw new MigrationFailedException("an update of this VM is under way");
        try
        {
            if (!vm.Migration().Status.IsTerminal()) throw new MigrationFailedException("a migration of this VM is under way");
            return Carry(request);
        }
        finally
        {
            Volatile.Write(ref _underWay, 0);
        }
    }

    private VmUpdateResult Carry(VmUpdateRequest request)
    {
        // Before a process is started that would be of no use.
        vm.Services.GetRequiredService<MigrationBlockers>().ThrowIfBlocked(request.Exec ? MigrationMode.CprExec : MigrationMode.CprTransfer);
        if (request.Exec) throw Replace(request);
        long start = Stopwatch.GetTimestamp();
        IMigrationEngine engine = vm.Migration();
        string main = Path.Combine(directory.DirectoryPath, $"{Environment.ProcessId}.main"), cpr = Path.Combine(directory.DirectoryPath, $"{Environment.ProcessId}.cpr");
        string[] arguments =
        [
            .. Own(context.CommandLine), "--incoming", MigrationChannelArgument.Unix("main", main), "--incoming", MigrationChannelArgument.Unix("cpr", cpr),
            "--replaces", $"{Environment.ProcessId}",
        ];
        // Left behind by an earlier process of this pid, it would be taken for the next one's.
        File.Delete(cpr);
        using NextProcess next = NextProcess.Start(request.Binary, arguments);
        MigrationParameters before = engine.Parameters.Current;
        KeyValuePair<MigrationCapability, bool>[] capabilities = Capabilities(engine);
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(request.Cancel, context.Interrupted);
        limit.CancelAfter(request.TimeoutMs);
        try
        {
            // While the new process starts, which takes longer.
            rehearse();
            next.WaitForSocket(cpr, limit.Token);
            engine.Parameters.Replace(before with { Mode = MigrationMode.CprTransfer });
            engine.Capabilities.Apply(capabilities.Select(static c => KeyValuePair.Create(c.Key, c.Key == MigrationCapability.ReturnPath)));
            Task<MigrationStatus> moving = engine.Migrate(Unix(main), Unix(cpr));
            using (limit.Token.Register(engine.Cancel))
            using (next.OnExit(engine.Cancel))
                moving.Wait(CancellationToken.None);
            if (moving.Result != MigrationStatus.Completed)
                throw new MigrationFailedException($"update failed, the VM goes on in process {Environment.ProcessId}: {Reason(engine, next, limit.IsCancellationRequested, request)}");
            MigrationInfo info = engine.Query();
            VmEntry entry = next.WaitForTakeOver(directory, s_takeOver);
            return new VmUpdateResult(next.Pid, (entry.RunningAtNs - info.Downtime!.AtNs) / 1e6, Stopwatch.GetElapsedTime(start).TotalMilliseconds, info.Ram!.TransferredBytes);
        }
        catch (OperationCanceledException e)
        {
            End(next);
            throw NotReady(request, e);
        }
        catch
        {
            if (!vm.RunState.State.Equals(Core.RunStates.RunState.PostMigrate)) End(next);
            throw;
        }
        finally
        {
            File.Delete(main);
            File.Delete(cpr);
            engine.Parameters.Replace(before);
            engine.Capabilities.Apply(capabilities);
        }
    }

    /// <summary>Ends it and removes the sockets that it could not remove itself.</summary>
    private void End(NextProcess next)
    {
        next.End();
        File.Delete(registration.NextPath(next.Pid));
        directory.RemoveLeftovers();
    }

    /// <summary>Replaces the process; who asked sees the connection end, and finds the VM again by name.</summary>
    /// <returns>Why it could not be done; the VM is as before.</returns>
    private MigrationFailedException Replace(VmUpdateRequest request)
    {
        IMigrationEngine engine = vm.Migration();
        string file = Path.Combine(directory.DirectoryPath, $"{Environment.ProcessId}.state");
        MigrationParameters before = engine.Parameters.Current;
        KeyValuePair<MigrationCapability, bool>[] capabilities = Capabilities(engine);
        IReadOnlyList<string> own = Own(context.CommandLine);
        using (var limit = CancellationTokenSource.CreateLinkedTokenSource(request.Cancel, context.Interrupted))
        {
            limit.CancelAfter(request.TimeoutMs);
            try
            {
                NextProcess.Try(request.Binary, own, rehearse, limit.Token);
            }
            catch (OperationCanceledException e)
            {
                throw NotReady(request, e);
            }
        }
        void Note(RunStateChange change)
        {
            if (RunStateTable.IsRunning(change.From)) Environment.SetEnvironmentVariable(VmRegistration.StoppedVariable, $"{MonotonicClock.NowNs}");
        }

        try
        {
            vm.RunState.Changed += Note;
            engine.Capabilities.Apply(capabilities.Select(static c => KeyValuePair.Create(c.Key, false)));
            engine.Parameters.Replace(before with { Mode = MigrationMode.CprExec, CprExecCommand = [.. NextProcess.Program(request.Binary), .. own, "--incoming", $"file:{file}"] });
            engine.Migrate(new MigrationAddress { Transport = MigrationTransport.File, Path = file }).Wait(CancellationToken.None);
            return new MigrationFailedException($"update failed, the VM goes on in process {Environment.ProcessId}: {engine.Query().Error}");
        }
        finally
        {
            vm.RunState.Changed -= Note;
            Environment.SetEnvironmentVariable(VmRegistration.StoppedVariable, null);
            engine.Parameters.Replace(before);
            engine.Capabilities.Apply(capabilities);
            File.Delete(file);
        }
    }

    /// <summary>What was set for migrations, to be put back: the new process knows nothing of it, and would wait for no channels of multifd, say.</summary>
    private static KeyValuePair<MigrationCapability, bool>[] Capabilities(IMigrationEngine engine) =>
        [.. MigrationCapabilitySet.Implemented.Select(c => KeyValuePair.Create(c, engine.Capabilities.IsOn(c)))];

    /// <summary>The arguments of this process without what concerned its own start.</summary>
    internal static IReadOnlyList<string> Own(IReadOnlyList<string> arguments)
    {
        var own = new List<string>();
        for (int i = 0; i < arguments.Count; i++)
        {
            string one = arguments[i];
            if (s_flags.Contains(one))
            {
                // A flag may have its value beside it.
                if (i + 1 < arguments.Count && bool.TryParse(arguments[i + 1], out _)) i++;
                continue;
            }
            if (s_perProcess.Contains(one)) { i++; continue; }
            if (s_perProcess.Concat(s_flags).Any(p => one.StartsWith(p + "=", StringComparison.Ordinal) || one.StartsWith(p + ":", StringComparison.Ordinal))) continue;
            own.Add(one);
        }
        return own;
    }

    private static MigrationFailedException NotReady(VmUpdateRequest request, OperationCanceledException e) =>
        new($"update failed, the VM goes on in process {Environment.ProcessId}: the new process was not ready within {request.TimeoutMs} ms", e);

    private static string Reason(IMigrationEngine engine, NextProcess next, bool timedOut, VmUpdateRequest request)
    {
        // What the new process could say before it ended tells more than how it ended; what this side met tells less.
        if (engine.Query().Error is { Side: "destination" } told) return told.ToString();
        if (next.WaitForExit(s_lastWord) is { } code) return $"the new process ended with exit code {code}";
        if (timedOut) return $"the new process was not ready within {request.TimeoutMs} ms";
        return engine.Query().Error?.ToString() ?? "the migration was cancelled";
    }

    private static MigrationAddress Unix(string path) => new() { Transport = MigrationTransport.Unix, Path = path };
}
