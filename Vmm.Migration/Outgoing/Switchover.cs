using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Migration.Attempts;
using Vmm.Migration.Ram;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The third phase: stops the VM and sends the rest (QEMU: <c>migration_completion</c>). If the attempt fails, <see cref="OutgoingMigration"/> puts the guest
/// back into its state.
/// </summary>
internal sealed class Switchover(OutgoingAttempt attempt, OutgoingLink link, SwitchoverAcks acks, StoppedGuest guest)
{
    private long _stopAt;

    /// <summary>With mode cpr-transfer, <c>CprFdTable.Changes</c> when the new process got the descriptors.</summary>
    internal long HandedOver { get; init; }

    /// <summary>Ends the wait in pre-switchover; set by <c>migrate-continue</c> and by the latch.</summary>
    internal required ManualResetEventSlim MayGoOn { get; init; }

    /// <summary>The parts of the downtime that are known so far.</summary>
    internal DowntimeReport Downtime { get; private set; } = new();

    /// <summary>Time since the stop of the VM, ms.</summary>
    internal double StoppedMs => Ms(_stopAt);

    private MigrationContext Vm => attempt.Vm;

    private MigrationStateMachine Machine => attempt.Vm.Machine;

    internal void Run()
    {
        var bql = Vm.Vm.Bql.Acquire();
        try
        {
            Stop();
            if (attempt.Plan.Context.Capabilities.IsOn(MigrationCapability.PauseBeforeSwitchover) && Machine.TryMove(MigrationStatus.Active, MigrationStatus.PreSwitchover))
            {
                bql.Dispose();
                link.Heartbeat.Wait(MayGoOn);
                bql = Vm.Vm.Bql.Acquire();
                attempt.Latch.ThrowIfSet();
                if (!Machine.TryMove(MigrationStatus.PreSwitchover, MigrationStatus.Device)) attempt.Latch.ThrowIfSet();
            }
            else if (!Machine.TryMove(MigrationStatus.Active, MigrationStatus.Device))
            {
                attempt.Latch.ThrowIfSet();
            }
            SendRam();
            SendState();
        }
        finally
        {
            bql.Dispose();
        }
        long sendAt = Stopwatch.GetTimestamp();
        link.File.Flush();
        Downtime = Downtime with { SendMs = Ms(sendAt) };
    }

    private void Stop()
    {
        attempt.Phase = "stop";
        _stopAt = Stopwatch.GetTimestamp();
        attempt.Progress.OnStop(link.File.Position);
        link.Watch.IsStopped = true;
        guest.Stop(RunState.FinishMigrate);
        Downtime = new DowntimeReport { DrainMs = attempt.Progress.DrainMs, DeviceStopMs = StoppedMs, AtNs = MonotonicClock.ToNs(_stopAt) };
        link.Stream.Find<GlobalState>()?.Store(guest.Before, guest.WasSuspended);
        if (attempt.Plan.Mode == MigrationMode.CprTransfer) LeaveProcess();
        Downtime = Downtime with { GuestAtNs = RunStateTable.IsRunning(guest.Before) ? Vm.Vm.Accelerator?.RunTimes.LeftAtNs ?? 0 : 0 };
        acks.ThrowIfMore();
    }

    /// <summary>
    /// Gives the VM up to the new process. Fails if descriptors changed since the new process got them, as when the guest sets up interrupts: they would be dead
    /// there. BQL: held.
    /// </summary>
    private void LeaveProcess()
    {
        if (Vm.Vm.CprFds.Changes != HandedOver)
            throw new DeviceStateException("descriptors of the VM changed after the new process was given them, as when a guest sets its interrupts up; try again");
        Vm.Vm.CprFds.IsLeaving = true;
    }

    private void SendRam()
    {
        attempt.Phase = "complete";
        long at = Stopwatch.GetTimestamp();
        if (attempt.Plan.Context.Compat.SendSwitchoverStart || link.Stream.UsesThreads) link.File.WriteCommand(MigCommand.SwitchoverStart);
        link.Stream.SaveLiveCompletePrecopy();
        // After the END sections, because writing them reads the devices' registers for the last time.
        link.Stream.StartThreads(attempt.Latch);
        Downtime = Downtime with { FinalRamMs = Ms(at) };
    }

    private void SendState()
    {
        attempt.Phase = "device-state";
        long at = Stopwatch.GetTimestamp();
        link.Stream.SaveState();
        attempt.HandOver.BeforeEnd(attempt.Latch, link.Peer);
        StreamEnd.Write(link.File, link.Stream, Vm.Identity);
        Downtime = Downtime with { DeviceStateMs = Ms(at), TotalMs = StoppedMs };
        link.File.Flush();
        link.Stream.JoinThreads();
        attempt.Latch.ThrowIfSet();
        link.Sender?.Finish();
        link.Stream.Find<RamSave>()?.NoteSent(link.File);
    }

    private static double Ms(long since) => Stopwatch.GetElapsedTime(since).TotalMilliseconds;
}
