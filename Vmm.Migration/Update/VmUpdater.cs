using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Update;

/// <summary>The updater of one VM: allows one update at a time, and refuses an update that cannot succeed before it starts a process.</summary>
internal sealed class VmUpdater(Vm vm, IMigrationEngine engine, MigrationBlockers blockers, MoveRehearsal rehearsal) : IVmUpdater
{
    private int _underWay;

    public async Task<UpdateResult> UpdateAsync(UpdateOptions options, CancellationToken cancel = default)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Check();
        // Two updates would use the same sockets, and the first to end would remove the other's.
        if (Interlocked.Exchange(ref _underWay, 1) != 0) throw new MigrationFailedException("an update of this VM is under way");
        try
        {
            if (!engine.Status.IsTerminal()) throw new MigrationFailedException("a migration of this VM is under way");
            if (vm.RunState.State == RunState.InMigrate) throw new DeviceStateException("the VM waits for an incoming migration, so there is nothing to move yet");
            if (vm.RunState.State == RunState.PostMigrate)
                throw new DeviceStateException("the VM has migrated away already, so there is nothing to move") { Hint = "'cont' runs it here again, if it runs nowhere else" };
            blockers.ThrowIfBlocked(options.Method == UpdateMethod.Exec ? MigrationMode.CprExec : MigrationMode.CprTransfer);
            using var folder = UpdateFolder.Open(options.Directory);
            using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancel);
            limit.CancelAfter(options.Timeout);
            Func<Task> rehearse = options.Rehearse ? () => rehearsal.RunAsync(vm.Options) : static () => Task.CompletedTask;
            try
            {
                return options.Method == UpdateMethod.Exec
                    ? throw await new ExecUpdate(vm, engine, options, folder).RunAsync(rehearse, limit.Token).ConfigureAwait(false)
                    : await new TransferUpdate(engine, options, folder).RunAsync(rehearse, limit.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException e) when (!cancel.IsCancellationRequested)
            {
                throw new MigrationFailedException(TransferUpdate.Failed(TransferUpdate.NotReady(options)), e);
            }
        }
        finally
        {
            Volatile.Write(ref _underWay, 0);
        }
    }
}
