using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Migration.Attempts;
using Vmm.Migration.Cpr;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Status;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// One attempt to send the VM away, on the thread <c>live_migration</c> (QEMU: <c>migration_thread</c>): connect, <see cref="OutgoingSetup"/>,
/// <see cref="PrecopyLoop"/>, <see cref="Switchover"/>, <see cref="Confirmation"/>. Every way out ends in <see cref="Finish"/>, which puts the VM
/// back into the state that it had unless the migration completed.
/// </summary>
internal sealed class OutgoingMigration : IDisposable
{
    private readonly MigrationContext _vm;
    private readonly OutgoingPlan _plan;
    private readonly OutgoingAttempt _attempt;
    private readonly StoppedGuest _guest;
    private readonly ManualResetEventSlim _continue = new();
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private IMigrationChannel? _channel;
    private volatile OutgoingLink? _link;
    private Timer? _cancelLimit;
    private int _cancelAsked;

    /// <param name="vm">The parts of the VM.</param>
    /// <param name="plan">What the attempt is asked to do.</param>
    /// <param name="channel">The channel if there is one already; owned.</param>
    internal OutgoingMigration(MigrationContext vm, OutgoingPlan plan, IMigrationChannel? channel)
    {
        (_vm, _plan, _channel) = (vm, plan, channel);
        _attempt = new OutgoingAttempt(vm, plan);
        _guest = new StoppedGuest(vm.Vm);
        _attempt.Latch.OnSet(_continue.Set);
    }

    /// <summary>Figures of this attempt.</summary>
    internal OutgoingProgress Progress => _attempt.Progress;

    internal Task<MigrationStatus> Start() => Task.Run(async () =>
    {
        MigrationStatus end = MigrationStatus.Failed;
        await WorkerThread.Run("live_migration", () => end = Run()).ConfigureAwait(false);
        return end;
    });

    /// <summary>
    /// Cancels. Once everything has been sent to a destination that runs as soon as it has confirmed, this can only ask it; a destination that waits for the
    /// final word does not get it.
    /// </summary>
    internal void Cancel()
    {
        if (!IsCancellable(_vm.Machine.Status)) return;
        var cancelled = new OperationCanceledException("the migration was cancelled");
        switch (_attempt.HandOver.On(SourceEvent.Cancelled))
        {
            case SourceStage.Moved or SourceStage.InDoubt or SourceStage.Sent:
                return; // too late
            case SourceStage.CancelAsked:
                // The status says cancelling when the answer has decided so, because the VM may have moved.
                if (Interlocked.Exchange(ref _cancelAsked, 1) != 0) return;
                // The destination may never answer: it may not even have read what was sent.
                _cancelLimit = new Timer(_ => _attempt.Latch.Set(cancelled), null, _plan.CancelAnswer, Timeout.InfiniteTimeSpan);
                _link!.Channel.Shutdown(ChannelShutdown.Write);
                return;
            default:
                for (MigrationStatus status = _vm.Machine.Status; IsCancellable(status) && !_vm.Machine.TryMove(status, MigrationStatus.Cancelling);) status = _vm.Machine.Status;
                if (_attempt.HandOver.HasFinalWord) _link!.TryWithdraw();
                _attempt.Latch.Set(cancelled);
                return;
        }
    }

    private static bool IsCancellable(MigrationStatus status) => status is MigrationStatus.Setup or MigrationStatus.Active or MigrationStatus.PreSwitchover or MigrationStatus.Device;

    /// <summary>Ends the wait in pre-switchover.</summary>
    internal void Continue() => _continue.Set();

    internal void Abort(Exception reason) => _attempt.Latch.Set(reason);

    /// <summary>Fails the attempt, because a device is gone whose state has not been sent. In the CPR modes the new process gets the device as it is.</summary>
    internal void LoseDevice(Exception reason)
    {
        if (_plan.Mode == MigrationMode.Normal && _attempt.HandOver.Stage == SourceStage.Sending) _attempt.Latch.Set(reason);
    }

    public void Dispose()
    {
        _cancelLimit?.Dispose();
        _channel?.Dispose();
        _attempt.Dispose();
        _continue.Dispose();
    }

    private MigrationStatus Run()
    {
        Exception? reason = null;
        Switchover? switchover = null;
        // Whoever asks for it: after a stop or a start that failed, a device may have been reset, and its state must not be sent as if it were whole.
        _vm.Vm.RunState.ChangeFailed += Abort;
        try
        {
            long handedOver = HandOverDescriptors();
            IMigrationChannel? channel = _channel;
            _channel = null;
            _attempt.Phase = "connect";
            OutgoingLink link = _link = OutgoingLink.Open(_attempt, channel);
            _attempt.Phase = "setup";
            OutgoingSetup.Run(_attempt, link);
            if (!_vm.Machine.TryMove(MigrationStatus.Setup, MigrationStatus.Active)) _attempt.Latch.ThrowIfSet();
            _attempt.Phase = "iterate";
            _vm.Rehearsed.Wait();
            var acks = new SwitchoverAcks(_attempt, link);
            // The CPR modes send no pages while the VM runs: RAM stays in place, or its pages go after the stop (vfio-migration 7).
            if (_plan.Mode == MigrationMode.Normal) new PrecopyLoop(_attempt, link, acks).Run();
            else link.WaitAnswered();
            switchover = new Switchover(_attempt, link, acks, _guest) { HandedOver = handedOver, MayGoOn = _continue };
            RealtimeBoost.During(_plan.IsUpdate, () => Complete(switchover, link));
            ReplaceProcess();
        }
#pragma warning disable CA1031 // Finish records it, and the VM goes on here.
        catch (Exception e)
#pragma warning restore CA1031
        {
            bool wasSending = _attempt.HandOver.Stage == SourceStage.Sending;
            reason = _attempt.Latch.Reason ?? e;
            // Before anything shuts the channel.
            if (_attempt.HandOver.On(e is OperationCanceledException ? SourceEvent.Cancelled : SourceEvent.Failed) == SourceStage.Back && _attempt.HandOver.HasFinalWord) _link!.TryWithdraw();
            // A destination that fails while the last bytes leave has said why, too.
            bool canHear = wasSending || _attempt.HandOver.HasFinalWord;
            if (canHear && e is ChannelException) _link?.WaitForCause();
            _attempt.Latch.Set(e);
            if (canHear) reason = _attempt.Latch.Reason!;
            // If the destination has confirmed, it has the VM, even though something failed here.
            if (_attempt.HandOver.Stage == SourceStage.CancelAsked) _attempt.HandOver.On(Confirmation.EventOf(_link!.EndAnswer()));
            if (_attempt.HandOver.Stage == SourceStage.Moved) reason = null;
        }
        return Finish(reason, switchover);
    }

    private void Complete(Switchover switchover, OutgoingLink link)
    {
        switchover.Run();
        long confirmAt = Stopwatch.GetTimestamp();
        if (!Confirmation.Wait(_attempt, link)) MigrationLog.FinalWordLost(_vm.Logger, link.Channel.Name);
        Progress.Downtime = switchover.Downtime with { LoadMs = Stopwatch.GetElapsedTime(confirmAt).TotalMilliseconds, TotalMs = switchover.StoppedMs };
    }

    /// <summary>With mode cpr-transfer, sends the VM's descriptors to the new process.</summary>
    /// <returns><c>CprFdTable.Changes</c> at that moment.</returns>
    private long HandOverDescriptors()
    {
        if (_plan.CprAddress is not { } address) return 0;
        _attempt.Phase = "cpr";
        if (!CprTransferSender.Send(address, _vm.Vm.CprFds, _attempt.Wake, out long changes)) _attempt.Latch.ThrowIfSet();
        return changes;
    }

    /// <summary>
    /// With mode cpr-exec, replaces this process's program. In QEMU this follows the completed migration; here it is its last step, so that its failure
    /// fails the migration.
    /// </summary>
    private void ReplaceProcess()
    {
        if (_plan.Mode != MigrationMode.CprExec) return;
        _attempt.Phase = "exec";
        CprExec.Replace(_vm.Vm.CprFds, _plan.Context.Parameters.CprExecCommand);
    }

    private MigrationStatus Finish(Exception? reason, Switchover? switchover)
    {
        _vm.Vm.RunState.ChangeFailed -= Abort;
        // Before the guest goes on here.
        _vm.Vm.CpuThrottle.Set(0);
        MigrationStateMachine machine = _vm.Machine;
        bool isInDoubt = reason is not null && _attempt.HandOver.Stage == SourceStage.InDoubt;
        bool cancelled = !isInDoubt && (reason is OperationCanceledException || (reason is not null && (machine.Status == MigrationStatus.Cancelling || _cancelAsked != 0)));
        if (cancelled) machine.TryMoveTo(MigrationStatus.Cancelling);
        if (reason is not null && !cancelled)
        {
            Progress.Error = MigrationErrors.From("source", _attempt.Phase, reason, _link?.Stream.Section);
            if (isInDoubt) Progress.Error = Progress.Error with { Message = $"{Progress.Error.Message}; {Doubt}", Hint = "look at the destination: if it does not run the VM, start it here with 'cont --force'" };
            machine.TryMoveTo(MigrationStatus.Failing);
        }
        // The latch ends the sending threads. A failed attempt sets it before it waits for them; a good one lets them finish first.
        if (reason is not null) _attempt.Latch.Set(reason);
        _link?.EndSending();
        _attempt.Latch.Set(new OperationCanceledException("the migration has ended"));
        if (reason is null) CleanUp();
        _link?.Close(isDone: reason is null);
        using (_vm.Vm.Bql.Acquire())
        {
            if (reason is null) _vm.Vm.RunState.Set(RunState.PostMigrate);
            else if (!isInDoubt) _vm.Vm.CprFds.IsLeaving = false;
            Notify(reason is null ? MigrationEvent.PrecopyDone : MigrationEvent.PrecopyFailed);
            // Devices undo what the migration did to them before the guest runs (notifiers), and release the rest afterwards (SaveCleanup).
            if (isInDoubt)
            {
                _guest.Keep();
                _vm.Vm.Hold(Doubt);
            }
            else if (reason is not null)
            {
                GoOnHere();
            }
        }
        if (reason is not null) CleanUp();
        Progress.TotalMs = (long)Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;
        Progress.Freeze();
        // When the attempt was confirmed although something failed here, only the switchover's own figures are known.
        if (reason is null) Progress.Downtime ??= switchover?.Downtime;
        else Progress.Downtime = null;
        if (Progress.Downtime is { } downtime) _vm.LogDowntime(downtime);
        if (Progress.Error is { } error) MigrationLog.Failed(_vm.Logger, error.ToString());
        _link?.Dispose();
        // "Cancelled" says that the VM goes on where it was. If it could not, there is an error to tell.
        MigrationStatus end = reason is null ? MigrationStatus.Completed : cancelled && Progress.Error is null ? MigrationStatus.Cancelled : MigrationStatus.Failed;
        if (!machine.TryMoveTo(end)) throw new InvalidOperationException($"migration ended in {machine.Status}, expected {end}");
        return end;
    }

    /// <summary>Why a VM is held whose destination may have it.</summary>
    private const string Doubt = "the destination had the whole VM and its answer is not known, so it may run there; the VM stays paused here";

    private void CleanUp()
    {
        try
        {
            _link?.Stream.SaveCleanup();
        }
#pragma warning disable CA1031 // The attempt has ended, one way or the other; a device that cannot clean up changes nothing about it.
        catch (Exception e)
#pragma warning restore CA1031
        {
            MigrationLog.CleanupFailed(_vm.Logger, e.Message);
        }
    }

    private void Notify(MigrationEvent what)
    {
        try
        {
            _vm.Notifiers.Notify(what, _plan.Mode);
        }
#pragma warning disable CA1031 // A device's exception must not keep the VM from going on.
        catch (Exception e)
#pragma warning restore CA1031
        {
            MigrationLog.RestartFailed(_vm.Logger, e.Message);
        }
    }

    /// <summary>BQL: held.</summary>
    private void GoOnHere()
    {
        if (_guest.GoOn() is not { } problem) return;
        MigrationLog.RestartFailed(_vm.Logger, problem.Message);
        string before = Progress.Error?.Message ?? "the migration was cancelled";
        Progress.Error = (Progress.Error ?? MigrationErrors.From("source", "restart", problem)) with { Message = $"{before}; and {problem.Message}" };
    }
}
